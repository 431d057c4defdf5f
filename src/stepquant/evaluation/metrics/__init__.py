"""One file per metric. The registry imports every file here, so no list names them."""
