"""Who multiplies: the choice of a library by measurement, the products, packed weights, this machine."""
