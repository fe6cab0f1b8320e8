"""What runs in the peers' environments; nothing here is ever imported by CompressLab, nor imports it."""
