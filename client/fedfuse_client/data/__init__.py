"""A site's data: manifest, decoding, transforms."""
