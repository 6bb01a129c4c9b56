"""Public functions: argument checks, autograd and fake functions, and the choice of a backend."""
