"""The end of what can be read of a file, and files of another kind than their name says."""


class BrokenFile(Exception):
    """Raised with the cause by the code that decodes a file, at the place where it breaks off.

    Args:
        cause: What is wrong.
        remedy: What to do, if the file is whole but not what its name says.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause)
        self.remedy = remedy


_OTHER_KINDS = {
    b"\x1f\x8b": ("the file is compressed with gzip", "Let its name end with .gz"),
    b"\x28\xb5\x2f\xfd": ("the file is compressed with zstd", "Let its name end with .zst"),
    b"BZh": ("the file is compressed with bzip2", "Compress it with gzip or zstd"),
    b"\xfd7zXZ\0": ("the file is compressed with xz", "Compress it with gzip or zstd"),
    b"PK\x03\x04": ("the file is a zip archive", "Unpack it"),
    b"PAR1": ("the file is parquet", "Let its name end with .parquet"),
    b"\xff\xfe": ("the file is UTF-16", "Write it as UTF-8"),
    b"\xfe\xff": ("the file is UTF-16", "Write it as UTF-8"),
}
"""How files begin that are neither lines nor tars, and what to say of them."""


def check_signature(head: bytes) -> None:
    """Check that a file of lines or a tar, decompressed, is not of another kind.

    Raises:
        BrokenFile: It is; the remedy says what to do.
    """
    for signature, (what, remedy) in _OTHER_KINDS.items():
        if head.startswith(signature):
            raise BrokenFile(what, remedy)
