"""Lab 3.11: small steps against one leap, and growing against starting large."""
