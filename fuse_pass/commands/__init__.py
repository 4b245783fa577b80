"""What `python -m fuse_pass` can do; one file per command."""
