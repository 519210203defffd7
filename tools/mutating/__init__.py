"""Changes of the code, the copies of the tree that they are tried in, and the tests that run what was changed."""
