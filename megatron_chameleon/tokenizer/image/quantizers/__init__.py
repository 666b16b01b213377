"""How latents become image codes, and codes become vectors."""
