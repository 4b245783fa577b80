"""What other libraries are told of us, by their own conventions: one module each, which needs that library."""
