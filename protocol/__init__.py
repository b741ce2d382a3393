"""Everything that the PLM owner and the data owner must agree on.

`types`             literal types of the wire, such as head policies
`errors`            one tree of errors, with its mapping to HTTP and gRPC
`messages`          all requests and answers
`codec`             a message's binary form and its JSON form
`protobuf`          a message's protobuf form
`chunks`            large answers in chunks that fit a gRPC message
`quantization`      number formats of representations
`head`              the LM head as a function: weight, bias, scale, soft-cap
`integrity`         CRC-32 of token ids, and checks for finite values
`rate_limits`       the remainder of a client's quotas, as header fields
`timing`            the server's time for a call, as a header field
`addresses`         loopback addresses
`cores`             CPU cores that a process may use, for both sides
`standard_streams`  UTF-8 in pipes and files, for both command lines

`pema_pb2` and `pema_pb2_grpc` are generated from `pema.proto`. No module here imports `plm_owner_server` or
`data_owner_client`.
"""

PROTOCOL_VERSION = 1
