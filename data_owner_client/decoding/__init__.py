"""Generation: how much PEMA has to say at each token (`interpolation`), and the loop that asks the PLM (`generate`)."""
