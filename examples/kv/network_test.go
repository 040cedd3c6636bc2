package main

import (
	"errors"
	"io"
	"net"
	"testing"
)

// A cut gate closes what is open in both directions, and lets nothing new
// through in either.
func TestGate(t *testing.T) {
	checkLeaks(t)
	listen := func(g *gate) (net.Listener, <-chan net.Conn) {
		plain, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		l := &gatedListener{plain, g}
		conns := make(chan net.Conn)
		go func() {
			defer close(conns)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				conns <- c
			}
		}()
		return l, conns
	}
	cut, other := newGate(), newGate()
	cutL, cutConns := listen(cut)
	otherL, otherConns := listen(other)
	defer cutL.Close()
	defer otherL.Close()
	dial := func(g *gate, l net.Listener) net.Conn {
		c, err := g.dial(t.Context(), "tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	closed := func(what string, c net.Conn) {
		if _, err := c.Read(make([]byte, 1)); err == nil {
			t.Errorf("%s is open", what)
		}
		c.Close()
	}

	out, outEnd := dial(cut, otherL), <-otherConns
	in, inEnd := dial(other, cutL), <-cutConns
	cut.setCut(true)
	for what, c := range map[string]net.Conn{"dialled": out, "its other end": outEnd, "accepted": inEnd, "its far end": in} {
		closed(what, c)
	}
	if _, err := cut.dial(t.Context(), "tcp", otherL.Addr().String()); !errors.Is(err, errCut) {
		t.Errorf("a node that is cut off dials: %v", err)
	}
	closed("a new connection to the node that is cut off", dial(other, cutL))
	if len(cut.conns) > 0 || len(other.conns) > 0 {
		t.Errorf("%d and %d connections are remembered after all were closed", len(cut.conns), len(other.conns))
	}

	cut.setCut(false)
	in = dial(other, cutL)
	inEnd = <-cutConns
	go func() {
		in.Write([]byte("x"))
		in.Close()
	}()
	if b, err := io.ReadAll(inEnd); string(b) != "x" || err != nil {
		t.Errorf("after the healing: %q, %v", b, err)
	}
	inEnd.Close()
}
