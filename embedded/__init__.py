"""Apache Kafka on loopback for laptops and tests: a wheel's Java, Kafka's own jars. Only the commands and the tests know it."""
