"""Training for what people prefer: distances in the features of recognition networks, a discriminator, pairs to distil from."""
