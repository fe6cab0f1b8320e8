"""Choosing what each layer gets: bits, by how much it suffers from fewer of them, or channels, by what a device takes."""
