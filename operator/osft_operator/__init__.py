"""The OSFTJob operator and the `osft` command line. Never imports torch."""
