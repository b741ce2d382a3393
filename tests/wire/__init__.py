"""Tests of what passes on the wire: REST and gRPC servers in the same process, reached over real sockets."""
