"""What the PLM owner and the data owner must agree on, and nothing else.

`errors`    one tree of errors, mapped once to HTTP
`codec`     a message's binary and its JSON form
`messages`  every request and answer of the wire
`head`      the LM head as a function: weight, bias, scale, soft-cap
`checks`    the echo of token ids that both sides compare

Imports neither `plm_owner_server` nor `data_owner_client`.
"""

PROTOCOL_VERSION = 1
