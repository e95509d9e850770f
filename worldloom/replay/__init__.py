"""Storage and sampling of environment steps."""
