"""One file per metric; a new one needs no line elsewhere, the registry finds it."""
