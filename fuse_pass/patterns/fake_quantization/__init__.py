"""Where fake quantisation belongs in a graph, and putting it there."""
