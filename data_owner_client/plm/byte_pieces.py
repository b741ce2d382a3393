"""Bytes of tokens that are no whole characters."""

from __future__ import annotations

import re

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# Byte-level tokenizers write bytes as characters: printable ones of Latin-1 as themselves, the others from U+0100 on
# (Radford et al. 2019, `bytes_to_unicode` of GPT-2's encoder).
_ALPHABET = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
}


def bytes_of_piece(piece: str) -> bytes:
    """Bytes of a token that the vocabulary writes as a byte piece (`<0x0A>`) or in the byte-level alphabet."""
    if match := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return piece.encode()
