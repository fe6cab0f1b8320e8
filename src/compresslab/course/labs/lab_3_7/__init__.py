"""Lab 3.7: good subnetworks before training, by gradients and by flow."""
