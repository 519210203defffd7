"""Changes to the code, the copies of the tree in which they are tried, and the tests that cover them."""
