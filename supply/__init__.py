"""What the project is built from: hash locks, advisories, the bill of materials. Not packaged."""
