"""One file per op: schema, fake, autograd and the list of implementations."""
