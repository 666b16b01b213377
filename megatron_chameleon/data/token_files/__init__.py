"""The ``.bin``/``.idx`` token files and the files beside them: format, writer and reader."""
