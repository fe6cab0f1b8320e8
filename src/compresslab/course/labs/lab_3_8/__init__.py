"""Lab 3.8: can a machine choose the sparsities for this device?"""
