"""Writers: the canonical codes in the layouts of other programs. The only importers of those programs' libraries."""
