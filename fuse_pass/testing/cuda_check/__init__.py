"""What a machine with an NVIDIA GPU settles in some minutes: `python -m fuse_pass.testing.cuda_check`.

Whether every op computes what it computes on a CPU, and how fast it is there. Without a network, and with nothing but
torch and its triton. Rows are written as they are done, so that a run that is cut short has told what it knows.
"""
