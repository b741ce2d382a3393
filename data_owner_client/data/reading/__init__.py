"""The reader of all files with texts: containers, forms of records, and problems."""
