"""What the project is built from: hash locks, advisories, the bill of materials. A tool of development, not packaged."""
