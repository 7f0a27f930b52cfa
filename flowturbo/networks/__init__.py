"""Networks on a device: loading, precision, the autoencoder, static graphs."""
