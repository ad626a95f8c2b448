"""Speed and memory on released models' shapes (`make bench`, `make bench-full`)."""
