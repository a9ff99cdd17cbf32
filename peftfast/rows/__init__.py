"""An adapter for every row of a batch, and from which token on: the mix of a forward, and how layers learn of it and
what they keep of it."""
