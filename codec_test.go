package raft

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	cryptorand "crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fortytw2/leaktest"
	"pgregory.net/rapid"
)

func testLimits() codecLimits {
	return codecLimits{
		maxBody: 4 << 20, maxInflight: 4096, readBuffer: 64 << 10,
		writeTimeout: 5 * time.Second, frameTimeout: 5 * time.Second,
	}
}

// wireService answers as the tests want. With hold it defers its replies.
type wireService struct {
	mu       sync.Mutex
	hold     bool
	requests []request
	order    []uint64 // of all appends
	appends  []appendArgs
	forwards []forwardArgs
	err      error
}

func (s *wireService) RequestVote(args *call[voteArgs], reply *call[voteReply]) error {
	reply.V = voteReply{Term: args.V.Term, Granted: args.V.PreVote}
	return s.note(args.req, &reply.deferred)
}

func (s *wireService) AppendEntries(args *call[appendArgs], reply *call[appendReply]) error {
	s.appends, s.order = append(s.appends, args.V), append(s.order, args.V.Seq)
	reply.V = appendReply{Term: args.V.Term, Success: true, Wanted: Index(args.V.Seq)}
	return s.note(args.req, &reply.deferred)
}

func (s *wireService) Forward(args *call[forwardArgs], reply *call[forwardReply]) error {
	s.forwards = append(s.forwards, args.V)
	reply.V = forwardReply{First: EntryID{7, 3}, Leader: 2}
	return s.note(args.req, &reply.deferred)
}

func (s *wireService) note(r request, deferred *bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if *deferred = s.hold; s.hold {
		s.requests = append(s.requests, r)
	}
	return s.err
}

// serve is the loop that a server runs: it serves what has arrived and then
// answers all of it.
func (s *wireService) serve(codec *serverCodec) error {
	server := rpc.NewServer()
	if err := server.RegisterName(serviceName, s); err != nil {
		return err
	}
	for {
		if err := server.ServeRequest(codec); err != nil {
			codec.Close()
			return codec.Err()
		}
		if codec.Buffered() {
			continue
		}
		for i, r := range s.requests {
			r.codec.WriteDeferred(r.seq, &appendReply{Term: s.appends[i].Term, Success: true, Wanted: Index(s.appends[i].Seq)})
		}
		s.requests, s.appends = s.requests[:0], s.appends[:0]
		codec.FlushReplies()
	}
}

func tcpPair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if client, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

// tlsPair wraps a TCP pair into TLS 1.3.
func tlsPair(t testing.TB) (client, server net.Conn) {
	c, s := tcpPair(t)
	cert := selfSigned(t)
	tc := tls.Client(c, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13})
	ts := tls.Server(s, &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13})
	done := make(chan error, 1)
	go func() { done <- ts.Handshake() }()
	if err := errors.Join(tc.Handshake(), <-done); err != nil {
		t.Fatal(err)
	}
	return tc, ts
}

// countingConn counts system calls.
type countingConn struct {
	net.Conn
	mu     sync.Mutex
	writes int
}

func (c *countingConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	c.writes++
	c.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *countingConn) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.writes
}

// startServer serves conn and returns a wait for why it ended.
func startServer(t testing.TB, s *wireService, conn net.Conn, limits codecLimits) (*serverCodec, func() error) {
	codec := newServerCodec(conn, maxWireVersion, limits)
	ended := make(chan error, 1)
	go func() { ended <- s.serve(codec) }()
	return codec, func() error { return <-ended }
}

func commands(first Index, term Term, data ...[]byte) Entries {
	var b entryBuilder
	for _, d := range data {
		b.add(entryCommand, d)
	}
	return b.seal(first, term, time.Unix(1, 0))
}

func drawEntryID(t *rapid.T, name string) EntryID {
	return EntryID{Index(rapid.Uint64().Draw(t, name+" index")), Term(rapid.Uint64().Draw(t, name+" term"))}
}

// TestBodiesRoundTrip: what decode reads is what encode was given, for every
// body of docs/WIRE.md, and a body cut short or extended is refused.
func TestBodiesRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := func(name string) uint64 { return rapid.Uint64().Draw(t, name) }
		b := func(name string) bool { return rapid.Bool().Draw(t, name) }
		term := Term(rapid.Uint64Range(0, 1<<63).Draw(t, "entry term"))
		first := Index(rapid.Uint64Range(1, 1<<62).Draw(t, "first"))
		data := rapid.SliceOfN(rapid.SliceOfN(rapid.Byte(), 0, 100), 0, 5).Draw(t, "data")
		var run []Entries
		if len(data) > 0 {
			run = []Entries{commands(first, term, data...)}
		}
		var unsealed entryBuilder
		for _, d := range data {
			unsealed.add(entryCommand, d)
		}
		unsealed.add(entryCommand, []byte("one at least"))
		bodies := []wireBody{
			&voteArgs{Term(u("term")), memberID(u("candidate")), drawEntryID(t, "last"), b("pre-vote"), b("transfer")},
			&voteReply{Term(u("term")), b("granted"), b("removed"), b("behind")},
			&appendArgs{Term: term + Term(u("later")%1000), Leader: memberID(u("leader")), Seq: u("number"),
				Prev: EntryID{first - 1, term}, Commit: Index(u("commit")), Heartbeat: run == nil && b("heartbeat"), Entries: run},
			&appendArgs{Term: term, Leader: memberID(u("leader")), Prev: EntryID{first - 1, term}, Heartbeat: true, Lease: time.Duration(rapid.Int64Range(1, int64(maxLeasePromise)).Draw(t, "lease"))},
			&appendReply{Term: Term(u("term")), Success: b("success"), Hint: drawEntryID(t, "hint"), Wanted: Index(u("wanted")), Promised: b("promised")},
			&forwardArgs{From: memberID(u("from")), Count: len(data) + 1, Encoded: unsealed.buf},
			&forwardReply{forwardRefusal(rapid.Byte().Draw(t, "refusal")), drawEntryID(t, "first"), memberID(u("leader"))},
			&snapshotArgs{Term: term + 1, Leader: memberID(u("leader")), Meta: SnapshotMeta{
				ID: [16]byte{1: byte(u("id"))}, Last: EntryID{first, term}, Time: time.Unix(0, int64(u("time"))).UTC(),
				ConfigIndex: 1, Config: (&configuration{members: []member{{id: 1, name: "a", addr: "a:1"}}}).encode(),
			}, Size: 1 << 40, Offset: u("offset") % (1 << 39), Data: unsealed.buf},
			&snapshotReply{Term(u("term")), u("offset"), b("done")},
			&readArgs{memberID(u("from")), b("lease")},
			&readReply{b("refused"), Index(u("index"))},
		}
		for _, want := range bodies {
			raw := encodeBody(want)
			got := reflect.New(reflect.TypeOf(want).Elem()).Interface().(wireBody)
			if err := got.decode(raw); err != nil {
				t.Fatalf("%T: %v", want, err)
			}
			if !reflect.DeepEqual(plain(got), plain(want)) {
				t.Fatalf("%T: got %+v, want %+v", want, got, want)
			}
			cut := rapid.IntRange(0, len(raw)-1).Draw(t, "cut")
			short := reflect.New(reflect.TypeOf(want).Elem()).Interface().(wireBody)
			if err := short.decode(raw[:cut:cut]); err == nil && !bytes.Equal(encodeBody(short), raw[:cut]) {
				t.Fatalf("%T: %d of %d bytes were taken for something else", want, cut, len(raw))
			}
			if _, open := want.(*snapshotArgs); open {
				continue // its data may have any length
			}
			if err := short.decode(append(raw[:len(raw):len(raw)], 0)); err == nil {
				t.Fatalf("%T: an extra byte was accepted", want)
			}
		}
	})
}

// encodeBody returns a whole body, as frame composes it.
func encodeBody(v wireBody) []byte {
	raw := v.encode(nil)
	switch v := v.(type) {
	case *appendArgs:
		for _, e := range v.Entries {
			raw = append(raw, e.Encoded()...)
		}
	case *forwardArgs:
		raw = append(raw, v.Encoded...)
	case *snapshotArgs:
		raw = append(raw, v.Data...)
	}
	return raw
}

// plain makes two bodies comparable: runs of entries become their bytes.
func plain(v wireBody) any {
	a, ok := v.(*appendArgs)
	if !ok {
		return v
	}
	b := *a
	b.Entries = nil
	return fmt.Sprintf("%+v %x", b, encodeBody(a))
}

// rawFrame builds a frame by hand, so that it may be wrong.
func rawFrame(edit func(h []byte), body []byte) []byte {
	h := make([]byte, frameHeaderBytes)
	copy(h, frameMagic)
	h[2], h[3], h[4] = maxWireVersion, byte(frameRequest), byte(methodRequestVote)
	binary.LittleEndian.PutUint32(h[8:], uint32(len(body)))
	binary.LittleEndian.PutUint64(h[16:], 1)
	if edit != nil {
		edit(h)
	}
	crc := crc32.Update(crc32.Update(0, castagnoli, h[:frameCRCOffset]), castagnoli, body)
	binary.LittleEndian.PutUint32(h[frameCRCOffset:], crc)
	return append(h, body...)
}

func voteBody() []byte { return (&voteArgs{Term: 1, Candidate: 2}).encode(nil) }

// TestServerRefusesBadInput: whatever breaks a rule of docs/WIRE.md closes the
// connection with an error that says what was wrong; nothing is served.
func TestServerRefusesBadInput(t *testing.T) {
	defer leaktest.Check(t)()
	dice := rand.New(rand.NewPCG(1, 2))
	random := make([]byte, 4096)
	for i := range random {
		random[i] = byte(dice.Uint32())
	}
	flipped := rawFrame(nil, voteBody())
	flipped[frameHeaderBytes+3] ^= 1
	entries := commands(5, 2, []byte("x"))
	appendBody := func(a appendArgs, e []byte) []byte { return append(a.encode(nil), e...) }
	appendFrame := func(a appendArgs, e []byte) []byte {
		return rawFrame(func(h []byte) { h[4] = byte(methodAppendEntries) }, appendBody(a, e))
	}
	torn := bytes.Clone(entries.Encoded())
	torn[len(torn)-1] ^= 1
	for _, c := range []struct {
		name  string
		input []byte
		want  string // in the error; EOF kinds are compared by identity
		is    error
	}{
		{"nothing", nil, "", io.EOF},
		{"random bytes", random, "starts with", errFrame},
		{"an HTTP request", []byte("GET / HTTP/1.1\r\nHost: example.com\r\n\r\n"), "starts with", errFrame},
		{"a TLS hello", append([]byte{0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3}, random[:64]...), "starts with", errFrame},
		{"a length of 4 GiB", rawFrame(func(h []byte) { h[4] = 2; binary.LittleEndian.PutUint32(h[8:], 1<<32-1) }, nil), "announces 4294967295 bytes", errFrame},
		{"a vote of 34 bytes", rawFrame(nil, append(voteBody(), 0)), "announces 34 bytes, the limit for ConsensusModule.RequestVote is 33", errFrame},
		{"a header cut short", rawFrame(nil, voteBody())[:20], "", io.ErrUnexpectedEOF},
		{"a body cut short", rawFrame(nil, voteBody())[:40], "", io.ErrUnexpectedEOF},
		{"a wrong checksum", flipped, "checksum is", errFrame},
		{"another version", rawFrame(func(h []byte) { h[2] = 9 }, voteBody()), "version 9, the handshake chose 1", errFrame},
		{"a reply", rawFrame(func(h []byte) { h[3] = 2 }, voteBody()), "kind 2 of method 1", errFrame},
		{"an unknown method", rawFrame(func(h []byte) { h[4] = 77 }, voteBody()), "method 77", errFrame},
		{"flags", rawFrame(func(h []byte) { h[5] = 1 }, voteBody()), "want zeros", errFrame},
		{"another group", rawFrame(func(h []byte) { h[12] = 1 }, voteBody()), "group 1", errFrame},
		{"number 0", rawFrame(func(h []byte) { h[16] = 0 }, voteBody()), "number 0", errFrame},
		{"a short vote", rawFrame(nil, voteBody()[:30]), "RequestVote: " + errShort.Error(), errShort},
		{"unknown vote flags", rawFrame(nil, append(voteBody()[:32], 4)), "", errFlags},
		{"a heartbeat with entries", appendFrame(appendArgs{Term: 2, Prev: EntryID{4, 2}, Heartbeat: true}, entries.Encoded()), "a heartbeat carries entries", errFrame},
		{"entries elsewhere", appendFrame(appendArgs{Term: 2, Prev: EntryID{3, 2}}, entries.Encoded()), "", errEntryCorrupt},
		{"torn entries", appendFrame(appendArgs{Term: 2, Prev: EntryID{4, 2}}, torn), "", errEntryCorrupt},
		{"entries of a later term", appendFrame(appendArgs{Term: 1, Prev: EntryID{4, 1}}, entries.Encoded()), "in an append of term 1", errFrame},
		{"entries older than prev", appendFrame(appendArgs{Term: 9, Prev: EntryID{4, 3}}, entries.Encoded()), "follow one of term 3", errFrame},
		{"an impossible prev", appendFrame(appendArgs{Term: 9, Prev: EntryID{1<<64 - 1, 3}}, nil), "is impossible", errFrame},
		{"a forward of nothing", rawFrame(func(h []byte) { h[4] = 3 }, (&forwardArgs{Count: 0}).encode(nil)), "announces 0 entries", errFrame},
		{"a forward that miscounts", rawFrame(func(h []byte) { h[4] = 3 }, append((&forwardArgs{Count: 2}).encode(nil), entries.Encoded()...)), "announces 2 entries and carries 1", errFrame},
		{"a forward cut short", rawFrame(func(h []byte) { h[4] = 3 }, append((&forwardArgs{Count: 1}).encode(nil), torn[:39]...)), "", errEntryCorrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			client, server := tcpPair(t)
			s := &wireService{}
			_, ended := startServer(t, s, server, testLimits())
			client.Write(c.input)
			client.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, client) // until the server closes
			err := ended()
			if !errors.Is(err, c.is) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the connection ended with %v, want %q and %v", err, c.want, c.is)
			}
			if len(s.appends)+len(s.forwards) > 0 {
				t.Error("the request was served")
			}
		})
	}
}

// TestLengthIsCheckedBeforeAllocating: a header announcing 4 GiB, or one byte
// over the limit, costs no memory.
func TestLengthIsCheckedBeforeAllocating(t *testing.T) {
	limits := testLimits()
	limits.maxBody = 64 << 20
	for _, length := range []uint32{1<<32 - 1, 64<<20 + 1} {
		frame := rawFrame(func(h []byte) { h[4] = 2; binary.LittleEndian.PutUint32(h[8:], length) }, nil)
		client, server := net.Pipe()
		go func() { client.Write(frame); client.Close() }()
		codec := newServerCodec(server, maxWireVersion, limits)
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		err := codec.ReadRequestHeader(new(rpc.Request))
		runtime.ReadMemStats(&after)
		if !errors.Is(err, errFrame) {
			t.Errorf("length %d: %v", length, err)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 64<<10 {
			t.Errorf("length %d made %d bytes", length, grown)
		}
	}
}

// TestClientRefusesBadReplies: a broken reply fails every call and closes the connection.
func TestClientRefusesBadReplies(t *testing.T) {
	reply := func(edit func(h []byte), body []byte) []byte {
		return rawFrame(func(h []byte) {
			h[3] = byte(frameReply)
			if edit != nil {
				edit(h)
			}
		}, body)
	}
	granted := (&voteReply{Term: 1, Granted: true}).encode(nil)
	for _, c := range []struct {
		name  string
		input []byte
		want  string
	}{
		{"the end", nil, "EOF"},
		{"another protocol", bytes.Repeat([]byte("SSH-2.0-OpenSSH\r\n"), 3), "starts with"},
		{"4 GiB", reply(func(h []byte) { binary.LittleEndian.PutUint32(h[8:], 1<<32-1) }, nil), "the limit for ConsensusModule.RequestVote is 1024"},
		{"a reply to the sentinel", reply(func(h []byte) { h[16] = 0 }, granted), "number 0"},
		{"a request", rawFrame(nil, granted), "is not expected here"},
		{"a reply of another method", reply(func(h []byte) { h[4] = 2 }, (&appendReply{}).encode(nil)), "a reply of ConsensusModule.AppendEntries came for"},
		{"a short reply", reply(nil, granted[:3]), errShort.Error()},
		{"an error", reply(func(h []byte) { h[3] = byte(frameError) }, []byte("no\nsuch \x1b thing")), "no?such ? thing"},
		{"an empty error", reply(func(h []byte) { h[3] = byte(frameError) }, nil), "peer gave no reason"},
	} {
		t.Run(c.name, func(t *testing.T) {
			defer leaktest.Check(t)()
			conn, peer := tcpPair(t)
			client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
			done := make(chan *rpc.Call, 2)
			client.Go(methodRequestVote, &call[voteArgs]{}, &call[voteReply]{}, done)
			if err := client.Flush(); err != nil {
				t.Fatal(err)
			}
			peer.Write(c.input)
			peer.(*net.TCPConn).CloseWrite()
			io.Copy(io.Discard, peer) // until the client closes
			if err := (<-done).Error; err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the call ended with %v, want %q", err, c.want)
			}
			if client.Err() == nil {
				t.Error("the client does not say why its connection ended")
			}
			client.Close()
			client.Close()
			if c := <-client.Go(methodRequestVote, &call[voteArgs]{}, &call[voteReply]{}, done).Done; c.Error != rpc.ErrShutdown {
				t.Errorf("a call after Close: %v", c.Error)
			}
		})
	}
}

// TestPipelinedCallsKeepTheirOrder: 2,000 appends in flight arrive in the
// order they were made, and every deferred reply finds its call, over plain
// TCP with entries by reference, over TLS and over a pipe.
func TestPipelinedCallsKeepTheirOrder(t *testing.T) {
	for name, pair := range map[string]func(testing.TB) (net.Conn, net.Conn){
		"tcp": tcpPair, "tls": tlsPair, "pipe": func(testing.TB) (net.Conn, net.Conn) { return net.Pipe() },
	} {
		t.Run(name, func(t *testing.T) {
			defer leaktest.CheckTimeout(t, time.Second)()
			const calls = 2000
			conn, peer := pair(t)
			s := &wireService{hold: true}
			_, ended := startServer(t, s, peer, testLimits())

			client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
			done := make(chan *rpc.Call, calls)
			large := bytes.Repeat([]byte("x"), 10_000)
			for i := range uint64(calls) {
				a := appendArgs{Term: 4, Leader: 1, Seq: i + 1, Prev: EntryID{Index(i), 3}}
				switch i % 3 {
				case 1:
					a.Entries = []Entries{commands(Index(i+1), 4, []byte("a"), []byte("bc"))}
				case 2:
					a.Entries = []Entries{commands(Index(i+1), 4, []byte("a"), large), commands(Index(i+3), 4, []byte("tail"))}
				}
				client.Go(methodAppendEntries, &call[appendArgs]{V: a}, &call[appendReply]{}, done)
				if i%50 == 49 {
					if err := client.Flush(); err != nil {
						t.Fatal(err)
					}
				}
			}
			for range calls {
				c := <-done
				if c.Error != nil {
					t.Fatal(c.Error)
				}
				if got, want := c.Reply.(*call[appendReply]).V.Wanted, Index(c.Args.(*call[appendArgs]).V.Seq); got != want {
					t.Fatalf("call %d got the reply of %d", want, got)
				}
			}
			client.Close()
			if err := ended(); err != io.EOF && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Errorf("the server's connection ended with %v", err)
			}
			for i, seq := range s.order {
				if seq != uint64(i+1) {
					t.Fatalf("request %d arrived as number %d", seq, i+1)
				}
			}
			if len(s.order) != calls {
				t.Errorf("%d of %d arrived", len(s.order), calls)
			}
		})
	}
}

// TestEveryMethod: each method's arguments and reply cross the wire.
func TestEveryMethod(t *testing.T) {
	defer leaktest.Check(t)()
	conn, peer := tcpPair(t)
	s := &wireService{}
	_, ended := startServer(t, s, peer, testLimits())
	client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
	done := make(chan *rpc.Call, 1)
	do := func(m methodID, args, reply any) {
		t.Helper()
		client.Go(m, args, reply, done)
		client.Flush()
		if c := <-done; c.Error != nil {
			t.Fatal(c.Error)
		}
	}
	vote := &call[voteReply]{}
	do(methodRequestVote, &call[voteArgs]{V: voteArgs{Term: 7, PreVote: true}}, vote)
	if want := (voteReply{7, true, false, false}); vote.V != want {
		t.Errorf("got %+v, want %+v", vote.V, want)
	}
	beat := &call[appendReply]{}
	do(methodAppendEntries, &call[appendArgs]{V: appendArgs{Term: 8, Seq: 5, Heartbeat: true}}, beat)
	if want := (appendReply{Term: 8, Success: true, Wanted: 5}); beat.V != want {
		t.Errorf("got %+v, want %+v", beat.V, want)
	}
	var b entryBuilder
	b.add(entryCommand, []byte("set"))
	b.add(entryCommand, bytes.Repeat([]byte("v"), 9000))
	forward := &call[forwardReply]{}
	sent := bytes.Clone(b.buf)
	do(methodForward, &call[forwardArgs]{V: forwardArgs{From: 3, Count: 2, Encoded: b.buf}}, forward)
	if want := (forwardReply{First: EntryID{7, 3}, Leader: 2}); forward.V != want {
		t.Errorf("got %+v, want %+v", forward.V, want)
	}
	client.Close()
	ended()
	if f := s.forwards[0]; f.From != 3 || f.Count != 2 || !bytes.Equal(f.Encoded, sent) {
		t.Errorf("the forward arrived as %d entries from %d", f.Count, f.From)
	}
}

// TestFramesKeepWhatIsKept: entries and forwards stay whole while later frames
// are read, and equal requests of other methods reuse one buffer.
func TestFramesKeepWhatIsKept(t *testing.T) {
	conn, peer := net.Pipe()
	go func() {
		c := newClientCodec(conn, maxWireVersion, testLimits())
		for i := range 3 {
			a := appendArgs{Term: 2, Prev: EntryID{Index(i), 1}, Entries: []Entries{commands(Index(i+1), 2, fmt.Appendf(nil, "command %d", i))}}
			c.WriteRequest(&rpc.Request{Seq: uint64(i + 1)}, &call[appendArgs]{V: a})
		}
		c.out.flush()
		conn.Close()
	}()
	s := &wireService{hold: true}
	codec := newServerCodec(peer, maxWireVersion, testLimits())
	server := rpc.NewServer()
	server.RegisterName(serviceName, s)
	for server.ServeRequest(codec) == nil {
	}
	for i := range 3 {
		if got, want := string(s.appends[i].Entries[0].data(0)), fmt.Sprintf("command %d", i); got != want {
			t.Errorf("append %d holds %q, want %q", i, got, want)
		}
	}
}

// TestOneWriteForAll: requests and replies are coalesced, each direction into one write.
func TestOneWriteForAll(t *testing.T) {
	const calls = 100
	a, b := tcpPair(t)
	conn, peer := &countingConn{Conn: a}, &countingConn{Conn: b}
	client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
	defer client.Close()
	s := &wireService{hold: true}
	codec := newServerCodec(peer, maxWireVersion, testLimits())
	server := rpc.NewServer()
	server.RegisterName(serviceName, s)
	done := make(chan *rpc.Call, calls)
	for i := range uint64(calls) {
		client.Go(methodAppendEntries, &call[appendArgs]{V: appendArgs{Seq: i}}, &call[appendReply]{}, done)
	}
	if n := conn.count(); n != 0 {
		t.Errorf("%d writes before Flush", n)
	}
	if err := client.Flush(); err != nil {
		t.Fatal(err)
	}
	if n := conn.count(); n != 1 {
		t.Errorf("%d writes for %d requests", n, calls)
	}
	for range calls {
		if err := server.ServeRequest(codec); err != nil {
			t.Fatal(err)
		}
	}
	if codec.Buffered() {
		t.Error("a request is said to be buffered when all were served")
	}
	codec.FlushReplies()
	if n := peer.count(); n != 0 {
		t.Errorf("%d writes although every reply was deferred", n)
	}
	for i := len(s.requests) - 1; i >= 0; i-- { // any order
		codec.WriteDeferred(s.requests[i].seq, &appendReply{Wanted: Index(i)})
	}
	codec.FlushReplies()
	if n := peer.count(); n != 1 {
		t.Errorf("%d writes for %d replies", n, calls)
	}
	for range calls {
		c := <-done
		if got, want := c.Reply.(*call[appendReply]).V.Wanted, Index(c.Args.(*call[appendArgs]).V.Seq); c.Error != nil || got != want {
			t.Fatalf("call %d got the reply of %d, error %v", want, got, c.Error)
		}
	}
}

// TestInflightIsBounded: at the limit Buffered asks for replies first, and a
// request beyond it ends the connection.
func TestInflightIsBounded(t *testing.T) {
	conn, peer := net.Pipe()
	limits := testLimits()
	limits.maxInflight = 3
	frame := func(seq uint64) []byte {
		return rawFrame(func(h []byte) { binary.LittleEndian.PutUint64(h[16:], seq) }, voteBody())
	}
	go func() {
		conn.Write(slicesConcat(frame(1), frame(2), frame(3), frame(4), frame(5)))
	}()
	go io.Copy(io.Discard, conn)
	s := &wireService{hold: true}
	codec := newServerCodec(peer, maxWireVersion, limits)
	server := rpc.NewServer()
	server.RegisterName(serviceName, s)
	serve := func(wantBuffered bool) {
		t.Helper()
		if err := server.ServeRequest(codec); err != nil {
			t.Fatal(err)
		}
		if got := codec.Buffered(); got != wantBuffered {
			t.Fatalf("Buffered is %v", got)
		}
	}
	serve(true)
	serve(true)
	serve(false) // the limit: answer first
	codec.WriteDeferred(1, &voteReply{})
	if !codec.Buffered() {
		t.Fatal("a reply makes no room")
	}
	serve(false)
	if err := server.ServeRequest(codec); err == nil || !errors.Is(codec.Err(), errFrame) || !strings.Contains(codec.Err().Error(), "while 3 wait") {
		t.Fatalf("the request over the limit: %v, %v", err, codec.Err())
	}
	if _, err := conn.Write([]byte{0}); err == nil {
		t.Error("the connection is still open")
	}
	if err := codec.WriteDeferred(2, &voteReply{}); err == nil {
		t.Error("a reply on a dead connection was accepted")
	}
}

// TestDeferredRepliesAreWithheld, for every method.
func TestDeferredRepliesAreWithheld(t *testing.T) {
	_, peer := net.Pipe()
	codec := newServerCodec(peer, maxWireVersion, testLimits())
	for i, deferred := range []bool{true, false} {
		for _, reply := range []any{
			&call[voteReply]{deferred: deferred}, &call[appendReply]{deferred: deferred}, &call[forwardReply]{deferred: deferred},
		} {
			before := len(codec.out.buf)
			if err := codec.WriteResponse(&rpc.Response{Seq: uint64(i + 1)}, reply); err != nil {
				t.Fatal(err)
			}
			if written := len(codec.out.buf) > before; written == deferred {
				t.Errorf("%T: deferred %v, written %v", reply, deferred, written)
			}
		}
	}
}

// TestBufferedMeansWhole: part of a frame is not a frame.
func TestBufferedMeansWhole(t *testing.T) {
	frame := rawFrame(nil, voteBody())
	for extra := range len(frame) + 1 {
		conn, peer := net.Pipe()
		go conn.Write(slicesConcat(frame, frame[:extra]))
		codec := newServerCodec(peer, maxWireVersion, testLimits())
		if err := codec.ReadRequestHeader(new(rpc.Request)); err != nil {
			t.Fatal(err)
		}
		if got, want := codec.Buffered(), extra == len(frame); got != want {
			t.Errorf("%d of %d bytes of the next frame: Buffered is %v", extra, len(frame), got)
		}
		codec.Close()
	}
}

func slicesConcat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

// TestMethodErrorEndsTheConnection: an error is a violation of the protocol;
// its text reaches the caller and nothing follows.
func TestMethodErrorEndsTheConnection(t *testing.T) {
	defer leaktest.Check(t)()
	conn, peer := tcpPair(t)
	s := &wireService{err: errors.New("this can't be")}
	_, ended := startServer(t, s, peer, testLimits())
	client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
	done := make(chan *rpc.Call, 1)
	client.Go(methodRequestVote, &call[voteArgs]{}, &call[voteReply]{}, done)
	client.Flush()
	if err := (<-done).Error; err != rpc.ServerError("this can't be") {
		t.Errorf("the caller was told %v", err)
	}
	if err := ended(); err == nil || err.Error() != "this can't be" {
		t.Errorf("the server's connection ended with %v", err)
	}
	client.Close()
}

// TestOversizeRequestIsRejected: it fails alone, is never sent, and the
// connection lives.
func TestOversizeRequestIsRejected(t *testing.T) {
	conn, peer := tcpPair(t)
	limits := testLimits()
	limits.maxBody = 1000
	_, ended := startServer(t, &wireService{}, peer, limits)
	client := newRPCClient(newClientCodec(conn, maxWireVersion, limits))
	done := make(chan *rpc.Call, 1)
	big := appendArgs{Term: 1, Entries: []Entries{commands(1, 1, make([]byte, 1000))}}
	client.Go(methodAppendEntries, &call[appendArgs]{V: big}, &call[appendReply]{}, done)
	if err := (<-done).Error; err == nil || !strings.Contains(err.Error(), "over the frame limit of 1000") {
		t.Errorf("got %v", err)
	}
	client.Go(methodRequestVote, &call[voteArgs]{}, &call[voteReply]{}, done)
	client.Flush()
	if err := (<-done).Error; err != nil {
		t.Errorf("the next call failed: %v", err)
	}
	client.Close()
	ended()
}

// TestSlowFramesAreCutOff: a peer that sends a byte now and then does not hold
// a connection longer than one that sends nothing.
func TestSlowFramesAreCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		limits := testLimits()
		limits.idleTimeout, limits.frameTimeout = time.Minute, 3*time.Second
		began := time.Now()
		trickled := make(chan struct{})
		go func() {
			defer close(trickled)
			time.Sleep(50 * time.Second) // idle, but not for too long
			for _, b := range rawFrame(nil, voteBody()) {
				if _, err := conn.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}()
		_, ended := startServer(t, &wireService{}, peer, limits)
		err := ended()
		if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "a frame was not complete after 3s") {
			t.Errorf("ended with %v", err)
		}
		if took := time.Since(began); took != 53*time.Second {
			t.Errorf("it took %v", took)
		}
		<-trickled
	})
}

// TestSilentConnectionsAreCutOff, but not between frames that come in time.
func TestSilentConnectionsAreCutOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		limits := testLimits()
		limits.idleTimeout = time.Minute
		began := time.Now()
		go io.Copy(io.Discard, conn)
		_, ended := startServer(t, &wireService{}, peer, limits)
		for range 2 {
			conn.Write(rawFrame(nil, voteBody()))
			time.Sleep(59 * time.Second)
		}
		conn.Write(rawFrame(nil, voteBody()))
		err := ended()
		if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "nothing came for 1m0s") {
			t.Errorf("ended with %v", err)
		}
		if took := time.Since(began); took != (2*59+60)*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// TestDeadlineOfAFrameIsNotKept: without an idle timeout, a frame that came in
// pieces leaves no deadline behind.
func TestDeadlineOfAFrameIsNotKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		limits := testLimits()
		limits.frameTimeout = 3 * time.Second
		go io.Copy(io.Discard, conn)
		s := &wireService{}
		_, ended := startServer(t, s, peer, limits)
		frame := rawFrame(nil, voteBody())
		conn.Write(frame[:30])
		time.Sleep(time.Second)
		conn.Write(frame[30:])
		time.Sleep(time.Hour)
		if _, err := conn.Write(frame); err != nil {
			t.Errorf("the connection ended while idle: %v", err)
		}
		synctest.Wait() // until it is answered
		conn.Close()
		if err := ended(); err != io.EOF {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestHungPeerIsHungUp: a peer that does not read fails a flush after the write
// timeout; the connection is closed, every call fails, and Close joins.
func TestHungPeerIsHungUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
		done := make(chan *rpc.Call, 3)
		for range 3 {
			client.Go(methodRequestVote, &call[voteArgs]{}, &call[voteReply]{}, done)
		}
		began := time.Now()
		if err := client.Flush(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("Flush returned %v", err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("Flush took %v", took)
		}
		for range 3 {
			if c := <-done; c.Error == nil {
				t.Error("a call succeeded")
			}
		}
		client.Close()
		if _, err := peer.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("the peer reads %v, want the end", err)
		}
	})
}

// TestHungCallerIsHungUp: the same for replies, where net/rpc ignores errors.
func TestHungCallerIsHungUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn, peer := net.Pipe()
		codec, ended := startServer(t, &wireService{}, peer, testLimits())
		conn.Write(rawFrame(nil, voteBody()))
		began := time.Now()
		if err := ended(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("ended with %v", err)
		}
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("it took %v", took)
		}
		if codec.Err() == nil {
			t.Error("the codec does not say why it ended")
		}
	})
}

// stubbornConn keeps its reader waiting after Close until it is released.
type stubbornConn struct {
	net.Conn
	release chan struct{}
}

func (c *stubbornConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil {
		<-c.release
	}
	return n, err
}

// TestCloseJoinsNetRPC: Close returns only after net/rpc's goroutine is done,
// for every caller. A Close that does not wait fails this test: the reader is
// kept waiting.
func TestCloseJoinsNetRPC(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, _ := net.Pipe()
		conn := &stubbornConn{a, make(chan struct{})}
		client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
		closed := make(chan struct{}, 3)
		for range 3 {
			go func() { client.Close(); closed <- struct{}{} }()
		}
		synctest.Wait()
		if len(closed) > 0 {
			t.Error("Close returned while net/rpc's goroutine reads")
		}
		close(conn.release)
		synctest.Wait()
		if len(closed) != 3 {
			t.Errorf("%d of 3 Close returned", len(closed))
		}
	})
}

// TestCloseLeavesNoGoroutine: after Close net/rpc's goroutine is gone, or
// within the instructions of its return.
func TestCloseLeavesNoGoroutine(t *testing.T) {
	if testing.Short() {
		t.Skip("dumps all goroutines 200 times")
	}
	stacks := make([]byte, 1<<20)
	for range 200 {
		conn, _ := net.Pipe()
		client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
		client.Close()
		dump := string(stacks[:runtime.Stack(stacks, true)])
		for i := 0; strings.Contains(dump, "rpc.(*Client).input"); i++ {
			if i == 100 {
				t.Fatalf("net/rpc's goroutine waits after Close:\n%s", dump)
			}
			runtime.Gosched()
			dump = string(stacks[:runtime.Stack(stacks, true)])
		}
	}
}

// TestNamesAreConstants: naming a method allocates nothing, and net/rpc finds
// each under that name.
func TestNamesAreConstants(t *testing.T) {
	for m := methodRequestVote; m <= methodReadIndex; m++ {
		if n := testing.AllocsPerRun(10, func() { sink = m.name() }); n != 0 || sink == "" {
			t.Errorf("naming method %d (%q) allocates %v times", m, sink, n)
		}
	}
	if (methodReadIndex+1).name() != "" || methodID(0).name() != "" {
		t.Error("an unknown method has a name")
	}
}

var sink string // keeps the compiler from removing what is measured

// selfSigned makes a certificate for one test.
func selfSigned(t testing.TB) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), cryptorand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(cryptorand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// FuzzFrame: no input makes either codec panic; a body that is accepted
// encodes to the same bytes.
func FuzzFrame(f *testing.F) {
	f.Add(true, byte(0), rawFrame(nil, voteBody()))
	f.Add(false, byte(1), voteBody())
	a := appendArgs{Term: 3, Leader: 1, Seq: 9, Prev: EntryID{4, 2}, Commit: 4, Entries: []Entries{commands(5, 3, []byte("x"), nil)}}
	f.Add(false, byte(2), encodeBody(&a))
	var b entryBuilder
	b.add(entryCommand, []byte("y"))
	f.Add(false, byte(3), encodeBody(&forwardArgs{From: 2, Count: 1, Encoded: b.buf}))
	f.Add(false, byte(4), (&voteReply{Term: 1, Granted: true}).encode(nil))
	f.Add(false, byte(5), (&appendReply{Term: 1, Success: true}).encode(nil))
	f.Add(false, byte(6), (&forwardReply{Refusal: forwardNotLeader, Leader: 2}).encode(nil))
	f.Fuzz(func(t *testing.T, raw bool, method byte, in []byte) {
		limits := testLimits()
		if raw {
			for _, toServer := range []bool{true, false} {
				var r frameReader
				r.init(&readerConn{Reader: bytes.NewReader(in)}, maxWireVersion, toServer, &limits)
				for {
					if _, body, err := r.next(); err != nil {
						break
					} else if len(body) > limits.maxBody {
						t.Fatalf("a body of %d bytes", len(body))
					}
				}
			}
			return
		}
		for _, v := range []wireBody{&voteArgs{}, &appendArgs{}, &forwardArgs{}, &voteReply{}, &appendReply{}, &forwardReply{}, &snapshotArgs{}, &snapshotReply{}}[method%8:][:1] {
			if err := v.decode(in); err == nil && !bytes.Equal(encodeBody(v), in) {
				t.Fatalf("%T: %x was read, and encodes to %x", v, in, encodeBody(v))
			}
		}
	})
}

// readerConn is a net.Conn that only reads.
type readerConn struct {
	net.Conn
	io.Reader
}

func (c *readerConn) Read(b []byte) (int, error)      { return c.Reader.Read(b) }
func (c *readerConn) SetReadDeadline(time.Time) error { return nil }

// BenchmarkAppendCall measures one append through net/rpc, both sides, at a
// window of 64: allocs/op counts all of client and server.
func BenchmarkAppendCall(b *testing.B) {
	for _, c := range []struct{ entries, bytes int }{{0, 0}, {64, 128}, {1, 64 << 10}} {
		b.Run(fmt.Sprintf("%dx%d", c.entries, c.bytes), func(b *testing.B) {
			conn, peer := tcpPair(b)
			s := &wireService{hold: true}
			codec, ended := startServer(b, s, peer, testLimits())
			defer codec.Close()
			client := newRPCClient(newClientCodec(conn, maxWireVersion, testLimits()))
			args := appendArgs{Term: 2, Prev: EntryID{1, 1}}
			if c.entries > 0 {
				data := make([][]byte, c.entries)
				for i := range data {
					data[i] = make([]byte, c.bytes)
				}
				args.Entries = []Entries{commands(2, 2, data...)}
			}
			const window = 64
			done := make(chan *rpc.Call, window)
			b.SetBytes(int64(args.size()))
			b.ReportAllocs()
			sent, received := 0, 0
			for b.Loop() {
				if sent-received == window {
					for len(done) > 0 || sent-received == window {
						if c := <-done; c.Error != nil {
							b.Fatal(c.Error)
						}
						received++
					}
				}
				client.Go(methodAppendEntries, &call[appendArgs]{V: args}, &call[appendReply]{}, done)
				if sent++; sent-received == window {
					client.Flush()
				}
			}
			client.Flush()
			for ; received < sent; received++ {
				<-done
			}
			client.Close()
			ended()
		})
	}
}

// wireExamples are the messages that docs/WIRE.md shows.
func wireExamples() map[string][]byte {
	frame := func(kind frameKind, seq uint64, v wireBody, text string) []byte {
		limits := testLimits()
		var w frameWriter
		w.init(nil, maxWireVersion, &limits)
		switch a := v.(type) {
		case *appendArgs:
			w.frame(kind, seq, v, a.Entries, nil)
		case *forwardArgs:
			w.frame(kind, seq, v, nil, a.Encoded)
		case *snapshotArgs:
			w.frame(kind, seq, v, nil, a.Data)
		case nil:
			w.errorFrame(methodForward, seq, text)
		default:
			w.frame(kind, seq, v, nil, nil)
		}
		return w.buf
	}
	dir := func(b byte) (d [16]byte) {
		for i := range d {
			d[i] = b
		}
		return d
	}
	var unsealed entryBuilder
	unsealed.add(entryCommand, []byte("hi"))
	var once entryBuilder
	once.add(entryOnce, RequestID{Session: 3, Seq: 7, DoneBelow: 6}.encode(), []byte("hi"))
	list := []Member{{ID: "a", Addr: "10.0.0.1:7000"}, {ID: "b", Addr: "10.0.0.2:7000"}}
	f, err := newFormation("demo", "a", dir(0xaa), list)
	if err == nil {
		_, err = f.heard("b", formAnswer{DirectoryID: dir(0xbb), List: list})
	}
	if err != nil {
		panic(err)
	}
	unformed := formAnswer{DirectoryID: dir(0xaa), List: list}
	f.saved()
	formed := f.answer()
	h := hello{MinVersion: 1, MaxVersion: 1, Role: rolePeer, Channel: channelAppend, Nonce: 0x0102030405060708, Boot: 3, DirectoryID: dir(0xaa), Cluster: "demo", From: "a", To: "b"}
	return map[string][]byte{
		"hello":                             encodeGreeting(greetHello, h.encode(nil)),
		"welcome":                           encodeGreeting(greetWelcome, (&welcome{Version: 1, Nonce: 5, Boot: 7, DirectoryID: dir(0xbb)}).encode(nil)),
		"refusal":                           encodeGreeting(greetRefusal, (&refusal{HandshakeStopping, "later"}).encode(nil)),
		"form question":                     encodeGreeting(greetForm, unformed.encode(nil)),
		"form answer":                       encodeGreeting(greetFormBack, formed.encode(nil)),
		"vote request":                      frame(frameRequest, 1, &voteArgs{Term: 5, Candidate: 2, Last: EntryID{9, 4}, PreVote: true}, ""),
		"vote reply":                        frame(frameReply, 1, &voteReply{Term: 5, Granted: true}, ""),
		"append request":                    frame(frameRequest, 2, &appendArgs{Term: 5, Leader: 2, Seq: 3, Prev: EntryID{9, 4}, Commit: 9, Entries: []Entries{commands(10, 5, []byte("hi"))}}, ""),
		"heartbeat":                         frame(frameRequest, 3, &appendArgs{Term: 5, Leader: 2, Prev: EntryID{10, 5}, Commit: 10, Heartbeat: true}, ""),
		"heartbeat that asks for a promise": frame(frameRequest, 3, &appendArgs{Term: 5, Leader: 2, Prev: EntryID{10, 5}, Commit: 10, Heartbeat: true, Lease: 500 * time.Millisecond}, ""),
		"promise":                           frame(frameReply, 3, &appendReply{Term: 5, Success: true, Promised: true}, ""),
		"read request":                      frame(frameRequest, 6, &readArgs{From: 1, Lease: true}, ""),
		"read reply":                        frame(frameReply, 6, &readReply{Index: 10}, ""),
		"append reply":                      frame(frameReply, 2, &appendReply{Term: 5, Success: true, Wanted: 12}, ""),
		"append refusal":                    frame(frameReply, 2, &appendReply{Term: 5, Hint: EntryID{7, 3}}, ""),
		"forward request":                   frame(frameRequest, 4, &forwardArgs{From: 1, Count: 1, Encoded: unsealed.buf}, ""),
		"forward reply":                     frame(frameReply, 4, &forwardReply{First: EntryID{11, 5}}, ""),
		"session request":                   frame(frameRequest, 4, &forwardArgs{From: 1, Count: 1, Encoded: once.buf}, ""),
		"snapshot block": frame(frameRequest, 5, &snapshotArgs{Term: 5, Leader: 2, Meta: SnapshotMeta{
			ID: dir(0xcc), Last: EntryID{9, 4}, Time: time.Unix(0, 0x0102030405060708), ConfigIndex: 1, Config: f.conf.encode(),
		}, Size: 4, Offset: 2, Data: []byte("hi")}, ""),
		"snapshot reply": frame(frameReply, 5, &snapshotReply{Term: 5, Offset: 4, Done: true}, ""),
		"error":          frame(frameError, 4, nil, "no"),
	}
}

// TestWireExamples: docs/WIRE.md shows the exact bytes of each message.
func TestWireExamples(t *testing.T) {
	doc, err := os.ReadFile("docs/WIRE.md")
	if err != nil {
		t.Fatal(err)
	}
	_, examples, ok := strings.Cut(string(doc), "\n## Examples\n")
	if !ok {
		t.Fatal("docs/WIRE.md has no section Examples")
	}
	shown := map[string][]byte{}
	parts := strings.Split(examples, "```")
	for i := 1; i < len(parts); i += 2 {
		name, dump, _ := strings.Cut(parts[i], "\n")
		raw, err := hex.DecodeString(strings.Join(strings.Fields(dump), ""))
		if err != nil {
			t.Errorf("example %q: %v", name, err)
		}
		shown[name] = raw
	}
	want := wireExamples()
	for name, raw := range want {
		if !bytes.Equal(shown[name], raw) {
			t.Errorf("example %q: docs/WIRE.md shows\n%x\nthe code writes\n```%s\n%s```", name, shown[name], name, hexLines(raw))
		}
	}
	if len(shown) != len(want) {
		t.Errorf("docs/WIRE.md shows %d examples, want %d", len(shown), len(want))
	}
}

func hexLines(raw []byte) string {
	var s strings.Builder
	for len(raw) > 0 {
		n := min(16, len(raw))
		fmt.Fprintf(&s, "% x\n", raw[:n])
		raw = raw[n:]
	}
	return s.String()
}
