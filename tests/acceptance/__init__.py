"""The "Done when" lists at full size: `make acceptance OF=images` writes the table beside this file."""
