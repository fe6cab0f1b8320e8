"""CompressLab makes neural networks smaller and faster, and proves what it cost."""
