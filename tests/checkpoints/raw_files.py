"""Safetensors files made byte by byte, right or wrong."""

import json


def encode_file(header, data=b"", length=None):
    """A file as it would lie on the disk, right or wrong."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    length = len(header) if length is None else length
    return length.to_bytes(8, "little") + header + data


def write(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path
