"""`python -m plm_owner_server.cli` is `pema-server`."""

from plm_owner_server.cli import main

if __name__ == "__main__":
    main()
