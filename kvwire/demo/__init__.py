"""The demonstration: two processes, real models, one cache shipped between them."""
