package raft

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

func dirOf(b byte) (d [16]byte) {
	for i := range d {
		d[i] = b
	}
	return d
}

func drawDir(t *rapid.T, name string) (d [16]byte) {
	copy(d[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, name))
	return d
}

// TestGreetingsRoundTrip: hello, welcome and refusal come back as they were,
// also with fields behind them that only a later version knows; a body cut
// short is refused.
func TestGreetingsRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		str := func(name string) string { return rapid.StringN(0, 80, 255).Draw(t, name) }
		h := hello{
			rapid.Byte().Draw(t, "min"), rapid.Byte().Draw(t, "max"), peerRole(rapid.Byte().Draw(t, "role")),
			channel(rapid.Byte().Draw(t, "channel")), rapid.Uint64().Draw(t, "nonce"), rapid.Uint64().Draw(t, "boot"),
			drawDir(t, "directory"), drawDir(t, "uuid"), str("cluster"), NodeID(str("from")), NodeID(str("to")),
		}
		w := welcome{rapid.Byte().Draw(t, "version"), rapid.Uint64().Draw(t, "nonce"), rapid.Uint64().Draw(t, "boot"), drawDir(t, "directory")}
		f := refusal{HandshakeReason(rapid.Byte().Draw(t, "reason")), printable(str("text"))}
		later := rapid.SliceOfN(rapid.Byte(), 0, 10).Draw(t, "later fields")
		check := func(kind greetingKind, raw []byte, want any, decode func([]byte) (any, error)) {
			k, body, err := readGreeting(bytes.NewReader(encodeGreeting(kind, append(raw, later...))), maxHandshakeBytes)
			if err != nil || k != kind {
				t.Fatalf("%v: got %v, %v", kind, k, err)
			}
			got, err := decode(body)
			if err != nil || !reflect.DeepEqual(got, want) {
				t.Fatalf("%v: got %+v, want %+v, error %v", kind, got, want, err)
			}
			if _, err := decode(raw[:rapid.IntRange(0, len(raw)-1).Draw(t, "cut")]); err == nil {
				t.Fatalf("%v: a body cut short was accepted", kind)
			}
		}
		check(greetHello, h.encode(nil), h, func(b []byte) (any, error) { return decodeHello(b) })
		check(greetWelcome, w.encode(nil), w, func(b []byte) (any, error) { return decodeWelcome(b) })
		check(greetRefusal, f.encode(nil), f, func(b []byte) (any, error) { return decodeRefusal(b) })
	})
}

var thisRelease = wireVersions{minWireVersion, maxWireVersion}

var nodeA = identity{Cluster: "demo", ClusterUUID: dirOf(1), Node: "a", DirectoryID: dirOf(0xaa), Nonce: 11, Boot: 3, Versions: thisRelease}
var nodeB = identity{Cluster: "demo", ClusterUUID: dirOf(1), Node: "b", DirectoryID: dirOf(0xbb), Nonce: 22, Boot: 4, Versions: thisRelease}

// shake runs both ends of a handshake.
func shake(t *testing.T, h hello, decide func(hello) (welcome, *refusal)) (w welcome, dialErr error, heard hello, acceptErr error) {
	t.Helper()
	conn, peer := net.Pipe()
	defer conn.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		heard, _, acceptErr = acceptHandshake(peer, thisRelease, decide, time.Second)
		if acceptErr != nil {
			peer.Close()
		}
	}()
	w, dialErr = dialHandshake(conn, h, time.Second)
	<-done
	if dialErr == nil { // nothing of what follows was read, and no deadline is left
		go peer.Write([]byte("frame"))
		next := make([]byte, 5)
		if _, err := io.ReadFull(conn, next); err != nil || string(next) != "frame" {
			t.Errorf("after the handshake: %q, %v", next, err)
		}
	}
	return w, dialErr, heard, acceptErr
}

func TestHandshakeAgrees(t *testing.T) {
	w, dialErr, heard, acceptErr := shake(t, nodeA.hello("b", channelAppend), func(h hello) (welcome, *refusal) {
		return nodeB.welcome(), nodeB.check(h, nodeA.DirectoryID)
	})
	if dialErr != nil || acceptErr != nil {
		t.Fatal(dialErr, acceptErr)
	}
	if want := (welcome{maxWireVersion, 22, 4, dirOf(0xbb)}); w != want {
		t.Errorf("welcome %+v, want %+v", w, want)
	}
	want := nodeA.hello("b", channelAppend)
	if heard != want {
		t.Errorf("heard %+v, want %+v", heard, want)
	}
	if err := nodeA.checkWelcome("b", w, nodeB.DirectoryID); err != nil {
		t.Errorf("the right directory was refused: %v", err)
	}
	if err := nodeA.checkWelcome("b", w, dirOf(9)); err == nil || err.Reason != HandshakeOtherDirectory {
		t.Errorf("another directory of the acceptor: %v", err)
	}
}

// TestHandshakeRefusals: each reason reaches both sides with a text that says
// what to do, and the connection carries nothing further.
func TestHandshakeRefusals(t *testing.T) {
	for _, c := range []struct {
		name   string
		edit   func(h *hello)
		known  [16]byte
		reason HandshakeReason
		text   string
	}{
		{"cluster", func(h *hello) { h.Cluster = "prod" }, dirOf(0xaa), HandshakeOtherCluster, "check ClusterID"},
		{"cluster UUID", func(h *hello) { h.ClusterUUID = dirOf(2) }, dirOf(0xaa), HandshakeOtherCluster, "are of different clusters"},
		{"to", func(h *hello) { h.To = "c" }, dirOf(0xaa), HandshakeOtherNode, `for node "c", this is "b"`},
		{"no to", func(h *hello) { h.To = "" }, dirOf(0xaa), HandshakeOtherNode, "check the addresses"},
		{"directory", func(h *hello) {}, dirOf(0xac), HandshakeOtherDirectory, "restore its own directory"},
		{"own name", func(h *hello) { h.From = "b" }, [16]byte{}, HandshakeOtherDirectory, "give each node an ID of its own"},
		{"role", func(h *hello) { h.Role = 7 }, dirOf(0xaa), HandshakeRoleRefused, "role 7"},
		{"channel", func(h *hello) { h.Channel = 9 }, dirOf(0xaa), HandshakeRoleRefused, "channel 9"},
		{"no name", func(h *hello) { h.From = "" }, dirOf(0xaa), HandshakeMalformed, "must give its ID"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := nodeA.hello("b", channelControl)
			c.edit(&h)
			_, dialErr, _, acceptErr := shake(t, h, func(h hello) (welcome, *refusal) { return nodeB.welcome(), nodeB.check(h, c.known) })
			var d, a *HandshakeError
			if !errors.As(dialErr, &d) || !errors.As(acceptErr, &a) {
				t.Fatalf("got %v and %v", dialErr, acceptErr)
			}
			if d.Reason != c.reason || a.Reason != c.reason || !d.ByPeer || a.ByPeer {
				t.Errorf("got %+v and %+v, want reason %v", d, a, c.reason)
			}
			if d.Text != a.Text || !strings.Contains(d.Text, c.text) {
				t.Errorf("texts %q and %q, want %q", d.Text, a.Text, c.text)
			}
		})
	}
}

// TestHandshakeAllows: what must not be refused. Unformed nodes have no UUID, a
// peer may be unknown, and a client needs neither name nor target.
func TestHandshakeAllows(t *testing.T) {
	unformed := nodeB
	unformed.ClusterUUID = [16]byte{}
	fresh := nodeA.hello("b", channelFormation)
	fresh.ClusterUUID = [16]byte{}
	for name, c := range map[string]struct {
		me    identity
		h     hello
		known [16]byte
	}{
		"unknown peer":        {nodeB, nodeA.hello("b", channelControl), [16]byte{}},
		"dialler is unformed": {nodeB, fresh, [16]byte{}},
		"me is unformed":      {unformed, nodeA.hello("b", channelControl), [16]byte{}},
		"client":              {nodeB, hello{Role: roleClient, Channel: channelControl, Cluster: "demo"}, [16]byte{}},
	} {
		if no := c.me.check(c.h, c.known); no != nil {
			t.Errorf("%s: refused: %v", name, no)
		}
	}
}

// TestVersions: the highest common version is chosen; without one the
// connection is refused before anybody decides.
func TestVersions(t *testing.T) {
	for _, c := range []struct {
		min, max byte
		ok       bool
	}{{1, 1, true}, {1, 9, true}, {0, 1, true}, {2, 9, false}, {0, 0, false}, {9, 1, false}} {
		h := nodeA.hello("b", channelControl)
		h.MinVersion, h.MaxVersion = c.min, c.max
		conn, peer := net.Pipe()
		asked := false
		accepted := make(chan error, 1)
		go func() {
			_, w, err := acceptHandshake(peer, thisRelease, func(hello) (welcome, *refusal) { asked = true; return nodeB.welcome(), nil }, time.Second)
			if err == nil && w.Version != maxWireVersion {
				err = errors.New("wrong version chosen")
			}
			accepted <- err
		}()
		conn.Write(encodeGreeting(greetHello, h.encode(nil)))
		kind, body, err := readGreeting(conn, maxHandshakeBytes)
		if err != nil {
			t.Fatal(err)
		}
		err = <-accepted
		if c.ok && (kind != greetWelcome || body[0] != maxWireVersion || err != nil) || !c.ok && (kind != greetRefusal || asked) {
			t.Errorf("versions %d to %d: got a %v, %v; asked: %v", c.min, c.max, kind, err, asked)
		}
		var he *HandshakeError
		if !c.ok && (!errors.As(err, &he) || he.Reason != HandshakeNoCommonVersion || !strings.Contains(he.Text, "upgrade one release at a time")) {
			t.Errorf("versions %d to %d: %v", c.min, c.max, err)
		}
	}
}

// TestDiallerChecksTheAnswer: an acceptor that does not follow the protocol.
func TestDiallerChecksTheAnswer(t *testing.T) {
	w := welcome{Version: 1}
	for name, c := range map[string]struct {
		answer []byte
		want   string
		reason HandshakeReason // 0: not a HandshakeError
	}{
		"hangs up":         {nil, "hung up during the handshake", 0},
		"cut short":        {encodeGreeting(greetWelcome, w.encode(nil))[:20], "hung up", 0},
		"TLS alert":        {[]byte{0x15, 3, 1, 0, 2, 2, 70}, "it speaks TLS and this node does not", HandshakeWrongMagic},
		"HTTP":             {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), "it speaks HTTP", HandshakeWrongMagic},
		"another protocol": {[]byte("SSH-2.0-OpenSSH_9.6\r\n"), "starts with 53 53 48 2d", HandshakeWrongMagic},
		"a hello":          {encodeGreeting(greetHello, nil), "answered the hello with a hello", HandshakeMalformed},
		"short welcome":    {encodeGreeting(greetWelcome, []byte{1}), "welcome is cut short", HandshakeMalformed},
		"short refusal":    {encodeGreeting(greetRefusal, nil), "refusal is cut short", HandshakeMalformed},
		"impossible":       {encodeGreeting(greetWelcome, (&welcome{Version: 200}).encode(nil)), "chose wire version 200", HandshakeMalformed},
	} {
		conn, peer := net.Pipe()
		go func() {
			readGreeting(peer, maxHandshakeBytes)
			peer.Write(c.answer)
			peer.Close()
		}()
		_, err := dialHandshake(conn, nodeA.hello("b", channelControl), time.Second)
		conn.Close()
		var h *HandshakeError
		if err == nil || !strings.Contains(err.Error(), c.want) || errors.As(err, &h) != (c.reason != 0) || h != nil && h.Reason != c.reason {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	conn, _ := net.Pipe()
	h := nodeA.hello("b", channelControl)
	h.Cluster = strings.Repeat("x", maxHandshakeBytes)
	if _, err := dialHandshake(conn, h, time.Second); err == nil || !strings.Contains(err.Error(), "too long") {
		t.Errorf("an oversize hello: %v", err)
	}
}

// TestAcceptorRefusesBadInput: bytes of other protocols and broken hellos.
func TestAcceptorRefusesBadInput(t *testing.T) {
	valid := nodeA.hello("b", channelControl)
	good := encodeGreeting(greetHello, valid.encode(nil))
	edit := func(f func(b []byte)) []byte { b := bytes.Clone(good); f(b); return b }
	for name, c := range map[string]struct {
		input []byte
		want  string
	}{
		"HTTP":           {[]byte("GET / HTTP/1.1\r\n\r\n"), "it speaks HTTP"},
		"TLS hello":      {[]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 9, 9, 9, 9, 9}, "set Config.TLS on every node or on none"},
		"random":         {[]byte{0x93, 1, 2, 0xff, 9, 9}, "only nodes of the cluster may talk here"},
		"nothing":        {nil, "hung up"},
		"cut short":      {good[:30], "hung up"},
		"4 GiB":          {edit(func(b []byte) { binary.LittleEndian.PutUint32(b[8:], 1<<32-1) }), "announces 4294967295 bytes, the limit is 4080"},
		"checksum":       {edit(func(b []byte) { b[30] ^= 1 }), "its checksum is"},
		"reserved":       {edit(func(b []byte) { b[6] = 1 }), "want zeros"},
		"a welcome":      {encodeGreeting(greetWelcome, nil), "began with a welcome"},
		"unknown kind":   {encodeGreeting(99, nil), "greeting of kind 99"},
		"a short hello":  {encodeGreeting(greetHello, []byte{1, 1, 1}), "hello is cut short"},
		"a long string":  {encodeGreeting(greetHello, append(valid.encode(nil)[:52], 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1)), "hello is cut short"},
		"formation talk": {encodeGreeting(greetForm, nil), "began with a formation question"},
	} {
		conn, peer := net.Pipe()
		go io.Copy(io.Discard, conn)
		go func() { conn.Write(c.input); conn.Close() }()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, _, err := acceptHandshake(peer, thisRelease, func(hello) (welcome, *refusal) {
			t.Errorf("%s: somebody was asked to decide", name)
			return welcome{}, nil
		}, time.Second)
		runtime.ReadMemStats(&after)
		peer.Close()
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 256<<10 {
			t.Errorf("%s: made %d bytes", name, grown)
		}
	}
}

// TestHandshakeDeadline: one deadline over the whole handshake, on both sides,
// however the bytes trickle.
func TestHandshakeDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		trickled := make(chan struct{})
		go func() {
			defer close(trickled)
			h := nodeA.hello("b", channelControl)
			for _, b := range encodeGreeting(greetHello, h.encode(nil)) {
				time.Sleep(time.Second)
				if _, err := conn.Write([]byte{b}); err != nil {
					return
				}
			}
		}()
		began := time.Now()
		_, _, err := acceptHandshake(peer, thisRelease, func(hello) (welcome, *refusal) { return welcome{}, nil }, 5*time.Second)
		peer.Close()
		if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "was not done after 5s") || time.Since(began) != 5*time.Second {
			t.Errorf("acceptor: %v after %v", err, time.Since(began))
		}
		<-trickled
		silent, _ := net.Pipe()
		began = time.Now()
		_, err = dialHandshake(silent, nodeA.hello("b", channelControl), 5*time.Second)
		silent.Close()
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(began) != 5*time.Second {
			t.Errorf("dialler: %v after %v", err, time.Since(began))
		}
	})
}

// TestPeersCantForgeLogLines: names and texts that a peer chose are quoted or
// stripped of control characters.
func TestPeersCantForgeLogLines(t *testing.T) {
	h := nodeA.hello("b", channelControl)
	h.From, h.Cluster = "x\n12:00:00 [b] all is well", "y\nz"
	_, dialErr, _, acceptErr := shake(t, h, func(h hello) (welcome, *refusal) { return nodeB.welcome(), nodeB.check(h, [16]byte{}) })
	if strings.Contains(acceptErr.Error(), "\n") || strings.Contains(dialErr.Error(), "\n") {
		t.Errorf("got %v\nand %v", acceptErr, dialErr)
	}
	f, err := decodeRefusal((&refusal{HandshakeStopping, "a\nb\x1b[31m\xff"}).encode(nil))
	if err != nil || f.Text != "a?b?[31m?" {
		t.Errorf("got %q, %v", f.Text, err)
	}
}

// FuzzHandshake: no greeting makes a decoder panic or read past its end.
func FuzzHandshake(f *testing.F) {
	h := nodeA.hello("b", channelControl)
	f.Add(byte(0), encodeGreeting(greetHello, h.encode(nil)))
	f.Add(byte(1), h.encode(nil))
	f.Add(byte(2), (&welcome{1, 2, 5, dirOf(3)}).encode(nil))
	f.Add(byte(3), (&refusal{HandshakeStopping, "later"}).encode(nil))
	f.Fuzz(func(t *testing.T, what byte, in []byte) {
		switch what % 4 {
		case 0:
			if _, body, err := readGreeting(bytes.NewReader(in), maxHandshakeBytes); err == nil && len(body) > maxHandshakeBytes {
				t.Fatalf("a body of %d bytes", len(body))
			}
		case 1:
			if h, err := decodeHello(in); err == nil {
				nodeB.check(h, dirOf(1))
				if again, err := decodeHello(h.encode(nil)); err != nil || again != h {
					t.Fatalf("%+v came back as %+v, %v", h, again, err)
				}
			}
		case 2:
			if w, err := decodeWelcome(in); err == nil && !bytes.HasPrefix(in, w.encode(nil)) {
				t.Fatalf("%x was read as %+v", in, w)
			}
		case 3:
			if r, err := decodeRefusal(in); err == nil && strings.ContainsAny(r.Text, "\n\r\x1b") {
				t.Fatalf("%q reaches the log", r.Text)
			}
		}
	})
}
