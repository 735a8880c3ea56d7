interfaces {
    wireguard wg0 {
        address 10.64.0.2/32
        private-key IBDkaXqb/LTFvF5cTA0Opgc1H+M52RJFjZ5G4JnlR1w=
        peer Y07spepCV5KcVIHVKyD9KeQj235sTpfGAOcEgloRXic= {
            allowed-ips 0.0.0.0/0
        }
    }
}
