"""Tests of what an image is; a package, so that they share `pictures`."""
