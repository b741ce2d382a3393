"""`python -m data_owner_client.cli` is `pema-client`."""

from data_owner_client.cli import main

if __name__ == "__main__":
    main()
