"""Activation quantizers: how the runtime rounds the inputs of layers, and the calibrators that find a static range."""
