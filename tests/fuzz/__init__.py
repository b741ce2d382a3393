"""Random and hostile input: generated calls, messages and files, for servers and readers in the same process."""
