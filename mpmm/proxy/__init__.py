"""Model servers: how an object comes to live in one process and be used from many.

Who starts what and who talks to whom; arrows are calls, every file named lies in the room's folder:

    MultiProcessShared --(tag lock)--> launcher --(zygote) fork--> server_process --> Host --life lock, socket-->
           |                                                                   ^
           +--> SharedProxy --> ServerLink ----------- one connection a thread-+

    room            folder, key, who is a client (alive lock), which servers live (life locks)
    transport       sockets: addresses of any length, keys, the peer's user
    channel         messages on an authenticated socket, large buffers through an arena
    arena           shared memory for large buffers on their way
    landing         private memory in which they arrive
    pickling        what is large, and how the rest becomes short
    wire            what is sent: requests, results, exceptions
    hosting         the object with its users, and the threads that answer for it
    server_process  a server's process from its first line to its last
    output          where its standard output and error go
    launcher        starting one, forked where that is possible and spawned where not; `ending` ends one
    zygote          the warm process from which servers are forked; `forked_server` is its customers' side
    leftovers       what an import leaves in a process besides code, and what becomes of it in forked servers
    spawned_server  a server in an interpreter of its own
    main_import     what must not be done while a server imports the main module
    identity        what a tag stands for, so that nobody takes one thing for another
    client          connections to a server, kept per thread
    context         what a manager hands to the servers that it has started
"""
