"""Passes over the joint graph of forward and backward, after AOTAutograd has traced it and before it is cut in two."""
