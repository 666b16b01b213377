"""The ways in which images become square. Nothing is imported, so that ``--help`` stays fast."""

IMAGE_FITS = ("role", "crop", "pad")
"""``role`` pads images in prompts of conversations and crops all others; ``crop`` crops all images,
and ``pad`` pads all."""
DEFAULT_IMAGE_FIT = "role"
