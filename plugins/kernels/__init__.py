"""The operators' GPU kernels in Triton, one file per operator. Only compiling and testing imports them."""
