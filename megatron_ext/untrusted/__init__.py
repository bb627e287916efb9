"""Files of others: read without running what they bring (`pickles`), and without leaving their directory (`paths`)."""
