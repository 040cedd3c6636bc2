package memnet

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/rpc"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// both runs a test in a synctest bubble and outside one.
func both(t *testing.T, f func(t *testing.T, n *Network)) {
	t.Helper()
	t.Run("bubble", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) { withNetwork(t, f) })
	})
	t.Run("outside", func(t *testing.T) { withNetwork(t, f) })
}

// bubble runs a test in a synctest bubble.
func bubble(t *testing.T, f func(t *testing.T, n *Network)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { withNetwork(t, f) })
}

func withNetwork(t *testing.T, f func(t *testing.T, n *Network)) {
	n := New(1)
	defer func() {
		n.Close()
		if k := n.Open(); k != 0 {
			t.Errorf("%d ends are open after Network.Close", k)
		}
	}()
	f(t, n)
}

func must[T any](t *testing.T) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// pair returns the two ends of a connection that host "a" has dialled to "b".
func pair(t *testing.T, n *Network) (a, b *conn) {
	t.Helper()
	l := must[net.Listener](t)(n.Listen("b:0"))
	defer l.Close()
	c := must[net.Conn](t)(n.Dialer("a")(t.Context(), "tcp", l.Addr().String()))
	d := must[net.Conn](t)(l.Accept())
	return c.(*conn), d.(*conn)
}

func send(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if k, err := c.Write([]byte(s)); k != len(s) || err != nil {
		t.Fatalf("Write(%q) = %d, %v", s, k, err)
	}
}

func receive(t *testing.T, c net.Conn, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if k, err := io.ReadFull(c, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v, want %q", b[:k], err, want)
	}
}

// readErr reads once and expects an error of the given kind and no bytes.
func readErr(t *testing.T, c net.Conn, want error) {
	t.Helper()
	if k, err := c.Read(make([]byte, 1)); k != 0 || !errors.Is(err, want) {
		t.Fatalf("Read = %d, %v, want %v", k, err, want)
	}
}

func writeErr(t *testing.T, c net.Conn, want error) {
	t.Helper()
	if k, err := c.Write([]byte("x")); k != 0 || !errors.Is(err, want) {
		t.Fatalf("Write = %d, %v, want %v", k, err, want)
	}
}

// nothing checks that c has nothing to read now: no byte, no end, no error.
func nothing(t *testing.T, c *conn) {
	t.Helper()
	c.net.mu.Lock()
	defer c.net.mu.Unlock()
	if k, ready, err := c.tryRead(make([]byte, 1)); ready {
		t.Fatalf("read %d bytes, %v, want to wait", k, err)
	}
}

// waiting returns when k readers of c are blocked.
func waiting(c *conn, k int) {
	for {
		c.net.mu.Lock()
		w := c.in.waiters
		c.net.mu.Unlock()
		if w == k {
			return
		}
		runtime.Gosched()
	}
}

func TestBytesBothWaysAndAddresses(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		send(t, a, "hello ")
		send(t, a, "there")
		receive(t, b, "hello there")
		send(t, b, "hi")
		receive(t, a, "hi")
		if h := a.LocalAddr().(Addr).Host() + a.RemoteAddr().(Addr).Host(); h != "ab" {
			t.Errorf("the dialled end's hosts are %q", h)
		}
		if a.LocalAddr() != b.RemoteAddr() || a.RemoteAddr() != b.LocalAddr() {
			t.Errorf("ends disagree: %v-%v and %v-%v", a.LocalAddr(), a.RemoteAddr(), b.LocalAddr(), b.RemoteAddr())
		}
		if k, err := a.Read(nil); k != 0 || err != nil {
			t.Errorf("an empty read: %d, %v", k, err)
		}
	})
}

func TestWriterMayReuseItsBuffer(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		buf := []byte("first")
		a.Write(buf)
		copy(buf, "XXXXX")
		receive(t, b, "first")
	})
}

func TestListen(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		l := must[net.Listener](t)(n.Listen("n0:1"))
		if _, err := n.Listen("n0:1"); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("second Listen: %v", err)
		}
		for _, bad := range []string{"", "n0", ":1", "n0:"} {
			if _, err := n.Listen(bad); err == nil {
				t.Errorf("Listen(%q) succeeded", bad)
			}
			if _, err := n.Dialer("a")(t.Context(), "tcp", bad); err == nil {
				t.Errorf("dial of %q succeeded", bad)
			}
		}
		l.Close()
		l.Close()
		must[net.Listener](t)(n.Listen("n0:1"))
		p, q := must[net.Listener](t)(n.Listen("n0:0")), must[net.Listener](t)(n.Listen("n0:0"))
		if p.Addr().String() == q.Addr().String() || p.Addr().(Addr).Host() != "n0" {
			t.Errorf("free ports: %v and %v", p.Addr(), q.Addr())
		}
	})
}

func TestDialToNobodyIsRefusedAtOnce(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		start := time.Now()
		_, err := n.Dialer("a")(t.Context(), "tcp", "b:1")
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial: %v", err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("took %v", d)
		}
	})
}

func TestDialOverCut(t *testing.T) {
	for _, cut := range []func(n *Network){
		func(n *Network) { n.Cut("a", "b") },
		func(n *Network) { n.CutOneWay("a", "b") },
		func(n *Network) { n.CutOneWay("b", "a") },
		func(n *Network) { n.Partition([]string{"a"}) },
	} {
		bubble(t, func(t *testing.T, n *Network) {
			l := must[net.Listener](t)(n.Listen("b:1"))
			cut(n)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			start := time.Now()
			_, err := n.Dialer("a")(ctx, "tcp", "b:1")
			var ne net.Error
			if !errors.Is(err, context.DeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() || time.Since(start) != time.Minute {
				t.Errorf("dial with a context: %v after %v", err, time.Since(start))
			}
			n.SetDialTimeout(3 * time.Second)
			start = time.Now()
			_, err = n.Dialer("a")(t.Context(), "tcp", "b:1")
			if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() || time.Since(start) != 3*time.Second {
				t.Errorf("dial with a timeout: %v after %v", err, time.Since(start))
			}
			n.SetDialTimeout(0)
			start = time.Now()
			time.AfterFunc(time.Hour, n.Heal)
			must[net.Conn](t)(n.Dialer("a")(t.Context(), "tcp", "b:1"))
			must[net.Conn](t)(l.Accept())
			if time.Since(start) != time.Hour {
				t.Errorf("the waiting dial got through after %v, want 1h", time.Since(start))
			}
		})
	}
}

func TestDialEndsWithContextAndClose(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		n.Cut("a", "b")
		ctx, cancel := context.WithCancel(t.Context())
		errs := make(chan error)
		dial := func(ctx context.Context) {
			_, err := n.Dialer("a")(ctx, "tcp", "b:1")
			errs <- err
		}
		go dial(ctx)
		cancel()
		if err := <-errs; !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled dial: %v", err)
		}
	})
	for _, wait := range []func(n *Network){
		func(n *Network) { n.Cut("a", "b") },
		func(n *Network) { n.SetDelay("a", "b", Constant(time.Hour)) },
	} {
		bubble(t, func(t *testing.T, n *Network) {
			wait(n)
			time.AfterFunc(time.Second, n.Close)
			start := time.Now()
			_, err := n.Dialer("a")(t.Context(), "tcp", "b:1")
			if d := time.Since(start); !errors.Is(err, net.ErrClosed) || d != time.Second {
				t.Errorf("dial during Close: %v after %v", err, d)
			}
		})
	}
}

func TestAcceptBacklog(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		l := must[net.Listener](t)(n.Listen("b:1"))
		dial := n.Dialer("a")
		for range backlog {
			must[net.Conn](t)(dial(t.Context(), "tcp", "b:1"))
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := dial(ctx, "tcp", "b:1"); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("dial over the backlog: %v", err)
		}
		done := make(chan net.Conn)
		go func() { done <- must[net.Conn](t)(dial(t.Context(), "tcp", "b:1")) }()
		synctest.Wait()
		must[net.Conn](t)(l.Accept())
		first := <-done // An Accept made room.
		go func() {
			_, err := dial(t.Context(), "tcp", "b:1")
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("dial to a listener that closed meanwhile: %v", err)
			}
			done <- nil
		}()
		synctest.Wait()
		l.Close()
		<-done
		readErr(t, first, syscall.ECONNRESET) // It was never accepted.
		if k := n.Open(); k != backlog+2 {
			t.Errorf("%d open, want %d dialled ends and 1 accepted end", k, backlog+1)
		}
	})
}

func TestCloseWakesAcceptorAndReader(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		l := must[net.Listener](t)(n.Listen("b:1"))
		errs := make(chan error)
		go func() {
			_, err := l.Accept()
			errs <- err
		}()
		l.Close()
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
		a, b := pair(t, n)
		for range 3 {
			go func() {
				_, err := a.Read(make([]byte, 1))
				errs <- err
			}()
		}
		waiting(a, 3)
		a.Close()
		for range 3 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("Read: %v", err)
			}
		}
		if err := a.Close(); err != nil {
			t.Errorf("second Close: %v", err)
		}
		readErr(t, a, net.ErrClosed)
		writeErr(t, a, net.ErrClosed)
		if err := a.CloseWrite(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("CloseWrite: %v", err)
		}
		if err := a.SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("SetDeadline: %v", err)
		}
		readErr(t, b, io.EOF)
		if k := n.Open(); k != 1 {
			t.Errorf("%d open, want b's end only", k)
		}
		b.Close()
		if k := n.Open(); k != 0 {
			t.Errorf("%d open", k)
		}
	})
}

func TestNetworkCloseWakesEverybody(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, _ := pair(t, n)
		l := must[net.Listener](t)(n.Listen("b:1"))
		errs := make(chan error)
		go func() {
			_, err := l.Accept()
			errs <- err
		}()
		go func() {
			_, err := a.Read(make([]byte, 1))
			errs <- err
		}()
		waiting(a, 1)
		n.Close()
		for range 2 {
			if err := <-errs; !errors.Is(err, net.ErrClosed) {
				t.Errorf("got %v", err)
			}
		}
		if _, err := n.Listen("c:1"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Listen: %v", err)
		}
		if _, err := n.Dialer("a")(t.Context(), "tcp", "b:1"); !errors.Is(err, net.ErrClosed) {
			t.Errorf("dial: %v", err)
		}
	})
}

func TestHalfClose(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		send(t, a, "last words")
		a.CloseWrite()
		a.CloseWrite()
		writeErr(t, a, syscall.EPIPE)
		receive(t, b, "last words")
		readErr(t, b, io.EOF)
		readErr(t, b, io.EOF)
		send(t, b, "still here")
		receive(t, a, "still here")
		b.Close()
		readErr(t, a, io.EOF)
	})
}

func TestPeerReadsWhatWasWrittenBeforeClose(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		send(t, a, "last words")
		a.Close()
		receive(t, b, "last words")
		readErr(t, b, io.EOF)
	})
}

func TestWriteToClosedPeer(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		b.Close()
		send(t, a, "nobody reads this") // As in TCP, the refusal comes back later.
		writeErr(t, a, syscall.EPIPE)

		a, b = pair(t, n)
		send(t, a, "unread")
		b.Close()
		writeErr(t, a, syscall.EPIPE)

		a, b = pair(t, n)
		n.Cut("a", "b")
		b.Close()
		send(t, a, "1")
		send(t, a, "2") // No refusal comes back over a cut.
		nothing(t, a)   // Nor does the end of the stream.
		n.Join("a", "b")
		readErr(t, a, io.EOF)
		writeErr(t, a, syscall.EPIPE)

		a, b = pair(t, n)
		n.CutOneWay("b", "a") // the way that a refusal would come
		b.Close()
		send(t, a, "1")
		send(t, a, "2")
		n.Heal()
		writeErr(t, a, syscall.EPIPE)
	})
}

func TestDelayIsVirtualTimeAndKeepsOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		draws := []time.Duration{5 * time.Second, time.Second, 7 * time.Second, -time.Second}
		n.SetDelay("a", "b", func(*rand.Rand) time.Duration {
			d := draws[0]
			draws = draws[1:]
			return d
		})
		start := time.Now()
		at := func(want time.Duration) {
			t.Helper()
			if d := time.Since(start); d != want {
				t.Errorf("at %v, want %v", d, want)
			}
		}
		send(t, a, "one")
		send(t, a, "two") // Overtakes nothing: arrives with "one".
		send(t, a, "three")
		a.CloseWrite() // Nor does the end of the stream.
		send(t, b, "back")
		receive(t, a, "back")
		at(0)
		buf := make([]byte, 100)
		if k, err := b.Read(buf); string(buf[:k]) != "onetwo" || err != nil {
			t.Errorf("read %q, %v", buf[:k], err)
		}
		at(5 * time.Second)
		if k, err := b.Read(buf); string(buf[:k]) != "three" || err != nil {
			t.Errorf("read %q, %v", buf[:k], err)
		}
		at(7 * time.Second)
		readErr(t, b, io.EOF)
		at(7 * time.Second)
	})
}

func TestDelayReachesWaitingReader(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.SetDelay("a", "b", Constant(time.Second))
		start := time.Now()
		time.AfterFunc(time.Second, func() { send(t, a, "x") })
		b.SetReadDeadline(start.Add(time.Minute))
		receive(t, b, "x")
		if d := time.Since(start); d != 2*time.Second {
			t.Errorf("arrived after %v, want 2s", d)
		}
		// A deadline before the arrival comes first, and loses nothing.
		send(t, a, "y")
		b.SetReadDeadline(time.Now().Add(time.Millisecond))
		readErr(t, b, os.ErrDeadlineExceeded)
		b.SetReadDeadline(time.Time{})
		receive(t, b, "y")
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("arrived after %v, want 3s", d)
		}
	})
}

func TestDelayTakenAwayKeepsOrder(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.SetDelay("a", "b", Constant(time.Second))
		send(t, a, "1")
		n.SetDelay("a", "b", nil)
		send(t, a, "2")
		start := time.Now()
		receive(t, b, "12")
		if d := time.Since(start); d != time.Second {
			t.Errorf("arrived after %v", d)
		}
		send(t, a, "3")
		receive(t, b, "3")
		if d := time.Since(start); d != time.Second {
			t.Errorf("the delay is still there: %v", d)
		}
	})
}

func TestDialTakesARoundTrip(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		must[net.Listener](t)(n.Listen("b:1"))
		n.SetDelay("a", "b", Constant(time.Second))
		n.SetDelay("b", "a", Constant(2*time.Second))
		n.SetDelay("a", "c", Constant(-time.Second))
		n.SetDelay("c", "a", Constant(time.Second))
		start := time.Now()
		n.Dialer("a")(t.Context(), "tcp", "c:1")
		if d := time.Since(start); d != time.Second {
			t.Errorf("dial with a delay below zero took %v", d)
		}
		start = time.Now()
		must[net.Conn](t)(n.Dialer("a")(t.Context(), "tcp", "b:1"))
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("dial took %v", d)
		}
		if _, err := n.Dialer("a")(t.Context(), "tcp", "b:2"); !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) != 6*time.Second {
			t.Errorf("refused dial: %v after %v", err, time.Since(start))
		}
		// A cut during the round trip is noticed.
		time.AfterFunc(time.Second, func() { n.Cut("a", "b") })
		time.AfterFunc(time.Hour, func() { n.Join("a", "b") })
		start = time.Now()
		must[net.Conn](t)(n.Dialer("a")(t.Context(), "tcp", "b:1"))
		if d := time.Since(start); d != time.Hour+3*time.Second {
			t.Errorf("dial over a cut took %v", d)
		}
	})
}

func TestDelaysRepeatWithTheSeed(t *testing.T) {
	arrivals := func(seed uint64, noise bool) (out []time.Duration) {
		synctest.Test(t, func(t *testing.T) {
			n := New(seed)
			defer n.Close()
			n.SetDelay("a", "b", HeavyTail(time.Millisecond, time.Minute))
			n.SetDelay("b", "a", HeavyTail(time.Millisecond, time.Minute))
			a, b := pair(t, n)
			for range 20 {
				if noise {
					send(t, b, "noise") // Another link's dice.
				}
				start := time.Now()
				send(t, a, "x")
				receive(t, b, "x")
				out = append(out, time.Since(start))
			}
		})
		return out
	}
	one := arrivals(1, false)
	if !slices.Equal(one, arrivals(1, true)) {
		t.Error("the same seed gave other delays")
	}
	if slices.Equal(one, arrivals(2, false)) {
		t.Error("another seed gave the same delays")
	}
	n := New(1)
	if n.link("a", "b").dice.Uint64() == n.link("b", "a").dice.Uint64() {
		t.Error("two links have the same dice")
	}
}

func TestHeavyTail(t *testing.T) {
	f, r := HeavyTail(time.Millisecond, time.Second), rand.New(rand.NewPCG(1, 2))
	draws := make([]time.Duration, 10000)
	for i := range draws {
		draws[i] = f(r)
	}
	slices.Sort(draws)
	median, p99 := draws[5000], draws[9900]
	if draws[0] < time.Millisecond || draws[9999] > time.Second {
		t.Errorf("range %v to %v", draws[0], draws[9999])
	}
	if median < 1600*time.Microsecond || median > 2000*time.Microsecond {
		t.Errorf("median %v, documented as 1.8 times the floor", median)
	}
	if p99 < 35*time.Millisecond || p99 > 60*time.Millisecond {
		t.Errorf("99th percentile %v, documented as 46 times the floor", p99)
	}
}

func TestCutHoldsAndHealDelivers(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		send(t, a, "arrived ")
		n.Cut("a", "b")
		send(t, a, "held ")
		a.CloseWrite()
		send(t, b, "back")
		receive(t, b, "arrived ") // It was there before the cut.
		nothing(t, b)
		nothing(t, a)
		done := make(chan error)
		go func() {
			rest, err := io.ReadAll(b) // blocked until the heal
			if string(rest) != "held " {
				t.Errorf("after the heal: %q", rest)
			}
			done <- err
		}()
		waiting(b, 1)
		n.Heal()
		if err := <-done; err != nil {
			t.Error(err)
		}
		receive(t, a, "back")
	})
}

func TestCutCatchesWhatIsOnItsWay(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.SetDelay("a", "b", Constant(time.Second))
		send(t, a, "early ")
		time.Sleep(time.Second) // virtual; "early" arrives
		send(t, a, "late")
		time.Sleep(time.Second / 2)
		n.Cut("a", "b")
		time.Sleep(time.Minute)
		receive(t, b, "early ")
		nothing(t, b)
		n.Join("a", "b")
		start := time.Now()
		receive(t, b, "late")
		if d := time.Since(start); d != time.Second {
			t.Errorf("sent again, it took %v", d)
		}
	})
}

func TestWhatArrivedBeforeACutCanBeRead(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.SetDelay("a", "b", Constant(time.Second))
		send(t, a, "early")
		time.Sleep(time.Second) // virtual
		n.Cut("a", "b")
		receive(t, b, "early")
	})
}

func TestCutOneWay(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.CutOneWay("a", "b")
		send(t, a, "there")
		send(t, b, "back")
		receive(t, a, "back")
		nothing(t, b)
		n.Join("a", "b")
		receive(t, b, "there")
	})
}

func TestCutFailsWritesOverTheCap(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		n.SetWriteCap(10)
		a, b := pair(t, n)
		n.Cut("a", "b")
		send(t, a, "0123456789")
		writeErr(t, a, os.ErrDeadlineExceeded)
		n.Heal()
		writeErr(t, a, os.ErrDeadlineExceeded) // Nobody has read yet.
		receive(t, b, "01234")
		send(t, a, "abcde")
		_, err := a.Write([]byte("f"))
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() || !strings.Contains(err.Error(), "SetWriteCap") {
			t.Errorf("over the cap: %v", err)
		}
		receive(t, b, "56789abcde")
	})
}

func TestOnCut(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.Cut("a", "b")
		n.SetOnCut(ResetOnCut)
		n.Cut("a", "c") // concerns others
		n.Cut("a", "b") // was cut already
		n.Heal()
		send(t, a, "x")
		receive(t, b, "x")
		n.CutOneWay("b", "a")
		readErr(t, a, syscall.ECONNRESET)
		readErr(t, b, syscall.ECONNRESET)
		n.Heal()

		a, b = pair(t, n)
		n.SetOnCut(ResetOnHeal)
		n.Partition([]string{"a"}, []string{"b"})
		send(t, a, "lost")
		nothing(t, a)
		n.Partition([]string{"b"}, []string{"a"}) // still cut
		nothing(t, a)
		n.Heal()
		readErr(t, a, syscall.ECONNRESET)
		readErr(t, b, syscall.ECONNRESET)
		writeErr(t, a, syscall.ECONNRESET)
	})
}

// reach returns which of the hosts a to d reach which, as "ab ad ...".
func reach(n *Network) string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []string
	for _, from := range "abcd" {
		for _, to := range "abcd" {
			if from != to && !n.cut(n.link(string(from), string(to))) {
				out = append(out, string(from)+string(to))
			}
		}
	}
	return strings.Join(out, " ")
}

func TestTopology(t *testing.T) {
	n := New(1)
	const all = "ab ac ad ba bc bd ca cb cd da db dc"
	for _, step := range []struct {
		name string
		do   func()
		want string
	}{
		{"new", func() {}, all},
		{"partition, the rest one group", func() { n.Partition([]string{"a"}) }, "bc bd cb cd db dc"},
		{"join over a partition", func() { n.Join("a", "b") }, "ab ba bc bd cb cd db dc"},
		{"cut within a group", func() { n.CutOneWay("c", "d") }, "ab ba bc bd cb db dc"},
		{"partition replaces all", func() { n.Partition([]string{"a", "b"}, []string{"c", "d"}) }, "ab ba cd dc"},
		{"a bridge", func() { n.Partition([]string{"a", "c"}, []string{"b", "c"}) }, "ac bc ca cb"},
		{"no groups", func() { n.Partition() }, all},
		{"cut", func() { n.Cut("a", "d") }, "ab ac ba bc bd ca cb cd db dc"},
		{"join", func() { n.Join("d", "a") }, all},
		{"cut and heal", func() { n.Cut("a", "b"); n.Partition([]string{"c"}); n.Cut("a", "d"); n.Heal() }, all},
	} {
		step.do()
		if got := reach(n); got != step.want {
			t.Errorf("%s: %s, want %s", step.name, got, step.want)
		}
	}
}

func TestStall(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		n.SetOnCut(ResetOnCut)
		n.Stall("a", "b")
		a, b := pair(t, n) // A hung process's kernel still accepts.
		send(t, a, "held")
		send(t, b, "back")
		receive(t, a, "back")
		nothing(t, b)
		n.Heal() // Heal undoes cuts only.
		nothing(t, b)
		n.Unstall("a", "b")
		receive(t, b, "held")

		// A link that is both cut and stalled needs both undone.
		n.SetOnCut(HoldOnCut)
		n.Stall("a", "b")
		n.Cut("a", "b")
		send(t, a, "x")
		n.Join("a", "b")
		nothing(t, b)
		n.Cut("a", "b")
		n.Unstall("a", "b")
		nothing(t, b)
		n.Join("a", "b")
		receive(t, b, "x")
	})
}

func TestBreak(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		c, d := pair(t, n)
		send(t, a, "lost")
		n.Break("a", "x")
		errs := make(chan error)
		go func() {
			_, err := a.Read(make([]byte, 1))
			errs <- err
		}()
		waiting(a, 1)
		n.Break("b", "a")
		if err := <-errs; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("blocked Read: %v", err)
		}
		for _, end := range []*conn{a, b, c, d} {
			readErr(t, end, syscall.ECONNRESET)
			writeErr(t, end, syscall.ECONNRESET)
			if err := end.CloseWrite(); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("CloseWrite: %v", err)
			}
		}
		if k := n.Open(); k != 4 {
			t.Errorf("%d open; a reset does not close", k)
		}
		n.Cut("a", "b")
		n.Heal()
		readErr(t, b, syscall.ECONNRESET)
		for _, hosts := range []string{"ab", "ba"} {
			a, b = pair(t, n)
			n.Stall("a", "b")
			send(t, a, "held")
			a.Close() // Its bytes and its end are still on the way.
			n.Break(hosts[:1], hosts[1:])
			readErr(t, b, syscall.ECONNRESET)
			n.Unstall("a", "b")
			readErr(t, b, syscall.ECONNRESET)
		}
		a, b = pair(t, n) // New connections are not affected.
		send(t, a, "x")
		receive(t, b, "x")
	})
}

func TestFilter(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		other, otherEnd := pair(t, n)
		var seen []string
		n.SetFilter("a", "b", func(p []byte) Verdict {
			seen = append(seen, string(p))
			if string(p) == "drop" {
				return Drop
			}
			return Pass
		})
		n.SetWriteCap(20)
		n.Cut("a", "b")
		send(t, a, "pass") // held, and delivered in spite of the later drop
		n.Heal()
		send(t, a, "drop")
		send(t, a, "after") // No hole: it must not arrive either.
		a.Write(nil)
		receive(t, b, "pass")
		nothing(t, b)
		n.Cut("a", "b")
		n.Heal()
		nothing(t, b)
		send(t, b, "back") // The other direction lives.
		receive(t, a, "back")
		send(t, other, "other") // So does another connection.
		receive(t, otherEnd, "other")
		if k, err := a.Write(make([]byte, 12)); k != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("swallowed bytes do not count: Write = %d, %v", k, err)
		}
		n.SetFilter("a", "b", nil)
		send(t, a, "z")
		a.Close()
		nothing(t, b) // The end of the stream is swallowed too.
		n.Cut("a", "b")
		n.Heal()
		nothing(t, b)
		if want := []string{"pass", "drop", "after", "other"}; !slices.Equal(seen, want) {
			t.Errorf("the filter saw %q, want %q", seen, want)
		}
	})
}

func TestFilterMayBreakAndCallVerbs(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		n.SetFilter("a", "b", func([]byte) Verdict { return Break })
		writeErr(t, a, syscall.ECONNRESET)
		readErr(t, b, syscall.ECONNRESET)

		a, b = pair(t, n)
		n.SetFilter("a", "b", func(p []byte) Verdict {
			if p[0] == 'x' {
				n.CutOneWay("a", "b")
			}
			return Pass
		})
		send(t, a, "1")
		send(t, a, "x")
		receive(t, b, "1")
		nothing(t, b)
		n.Heal()
		receive(t, b, "x")
	})
}

func TestDeadlines(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		start := time.Now()
		a.SetReadDeadline(start.Add(time.Second))
		readErr(t, a, os.ErrDeadlineExceeded)
		if d := time.Since(start); d != time.Second {
			t.Errorf("after %v", d)
		}
		send(t, b, "x")
		readErr(t, a, os.ErrDeadlineExceeded) // passed, whatever there is to read
		a.SetReadDeadline(time.Time{})
		receive(t, a, "x")

		a.SetWriteDeadline(time.Now().Add(time.Second))
		send(t, a, "y")
		time.Sleep(time.Second)
		writeErr(t, a, os.ErrDeadlineExceeded)
		a.SetDeadline(time.Time{})
		send(t, a, "z")
		receive(t, b, "yz")

		// A waiting reader follows a deadline that moves, in both directions.
		start = time.Now()
		time.AfterFunc(time.Second, func() { a.SetReadDeadline(start.Add(5 * time.Second)) })
		time.AfterFunc(2*time.Second, func() { a.SetReadDeadline(start.Add(3 * time.Second)) })
		a.SetReadDeadline(start.Add(time.Minute))
		readErr(t, a, os.ErrDeadlineExceeded)
		if d := time.Since(start); d != 3*time.Second {
			t.Errorf("after %v, want 3s", d)
		}
		start = time.Now()
		a.SetReadDeadline(start.Add(time.Second))
		time.AfterFunc(time.Second/2, func() { a.SetReadDeadline(time.Time{}) })
		time.AfterFunc(time.Hour, func() { b.Close() })
		readErr(t, a, io.EOF)
	})
}

func TestDeadlineWakesEveryReader(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, _ := pair(t, n)
		errs := make(chan error)
		for range 5 {
			go func() {
				_, err := a.Read(make([]byte, 1))
				errs <- err
			}()
		}
		waiting(a, 5)
		a.SetDeadline(time.Now().Add(2 * time.Millisecond))
		for range 5 {
			if err := <-errs; !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("Read: %v", err)
			}
		}
	})
}

func TestOneWriteFeedsSeveralReaders(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		got := make(chan byte)
		for range 5 {
			go func() {
				buf := make([]byte, 1)
				b.Read(buf)
				got <- buf[0]
			}()
		}
		waiting(b, 5)
		send(t, a, "vwxyz")
		sum := 0
		for range 5 {
			sum += int(<-got)
		}
		if sum != 'v'+'w'+'x'+'y'+'z' {
			t.Error("a byte was lost or read twice")
		}
	})
}

// Without a delay a reader is woken once for what it reads at once, and has no
// timer.
func TestNoNeedlessWakeups(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		a, b := pair(t, n)
		got := make(chan string)
		go func() {
			buf := make([]byte, 10)
			k, _ := b.Read(buf)
			got <- string(buf[:k])
		}()
		synctest.Wait()
		n.mu.Lock()
		a.out.accept([]byte("1")) // hands the reader its wake-up
		a.out.accept([]byte("2")) // before it could run
		n.mu.Unlock()
		if s := <-got; s != "12" {
			t.Errorf("read %q", s)
		}
		if len(b.in.wake) != 0 || b.in.told || b.in.timer != nil {
			t.Errorf("left over: %d wake-ups, told %v, timer %v", len(b.in.wake), b.in.told, b.in.timer)
		}
		send(t, a, "3")
		if len(b.in.wake) != 0 {
			t.Error("a write woke nobody's reader")
		}
		receive(t, b, "3")

		// A wake-up that is sent when the reader's deadline has already woken
		// it is taken back, in those rounds in which the reader is that fast.
		for range 100 {
			b.SetReadDeadline(time.Now().Add(time.Second))
			go func() {
				b.Read(make([]byte, 1))
				got <- ""
			}()
			synctest.Wait()
			n.mu.Lock()
			time.Sleep(time.Second) // virtual
			for range 100 {
				runtime.Gosched()
			}
			b.in.signal()
			n.mu.Unlock()
			<-got
			if len(b.in.wake) != 0 || b.in.told {
				t.Fatal("a wake-up waits for nobody")
			}
		}
	})
}

func TestMemoryIsGivenBack(t *testing.T) {
	n := New(1)
	defer n.Close()
	a, b := pair(t, n)
	send(t, a, strings.Repeat("x", 4<<20))
	io.CopyN(io.Discard, b, 4<<20)
	if k := b.in.buf.Cap(); k != 0 {
		t.Errorf("%d bytes are kept after a burst", k)
	}
	send(t, a, "unread")
	b.Close()
	for range 100 {
		a.Write(make([]byte, 1000))
	}
	if k := b.in.buf.Cap(); k != 0 {
		t.Errorf("%d bytes are kept for a closed reader", k)
	}
}

type echo struct{}

func (echo) Double(in int, out *int) error {
	*out = 2 * in
	return nil
}

func TestNetRPC(t *testing.T) {
	both(t, func(t *testing.T, n *Network) {
		n.SetDelay("a", "b", Constant(time.Millisecond))
		server := rpc.NewServer()
		if err := server.RegisterName("Echo", echo{}); err != nil {
			t.Fatal(err)
		}
		l := must[net.Listener](t)(n.Listen("b:1"))
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { server.ServeConn(c) })
			}
		})
		client := rpc.NewClient(must[net.Conn](t)(n.Dialer("a")(t.Context(), "tcp", "b:1")))
		var calls sync.WaitGroup
		for i := range 100 {
			calls.Go(func() {
				var out int
				if err := client.Call("Echo.Double", i, &out); err != nil || out != 2*i {
					t.Errorf("Double(%d) = %d, %v", i, out, err)
				}
			})
		}
		calls.Wait()
		n.Cut("a", "b")
		call := client.Go("Echo.Double", 1, new(int), make(chan *rpc.Call, 1))
		n.Break("a", "b")
		if err := (<-call.Done).Error; err == nil {
			t.Error("a call over a broken connection succeeded")
		}
		client.Close()
		l.Close()
		wg.Wait()
		if k := n.Open(); k != 0 {
			t.Errorf("%d open", k)
		}
	})
}

// A peer that reads nothing does not block net/rpc's writers, so virtual time
// goes on.
func TestHungPeerDoesNotStopVirtualTime(t *testing.T) {
	bubble(t, func(t *testing.T, n *Network) {
		n.SetWriteCap(1 << 10)
		a, _ := pair(t, n)
		client := rpc.NewClient(a)
		failed := make(chan struct{})
		var once sync.Once
		for range 50 {
			go func() {
				if err := client.Call("Echo.Double", strings.Repeat("x", 100), new(int)); errors.Is(err, os.ErrDeadlineExceeded) {
					once.Do(func() { close(failed) })
				}
			}()
		}
		select {
		case <-failed:
		case <-time.After(time.Hour):
			t.Error("no write failed over the cap")
		}
		client.Close()
	})
}

// pump copies total random bytes from w to r in pieces of random sizes while
// disturb runs again and again, and checks that they arrive whole.
func pump(t *testing.T, w, r net.Conn, disturb func(dice *rand.Rand)) {
	t.Helper()
	const total = 1 << 18
	data := make([]byte, total)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		dice := rand.New(rand.NewPCG(1, 1))
		for rest := data; len(rest) > 0; {
			k := min(len(rest), 1+dice.IntN(3000))
			if _, err := w.Write(rest[:k]); err != nil {
				t.Errorf("Write: %v", err)
				break
			}
			rest = rest[k:]
		}
		w.(*conn).CloseWrite()
	})
	wg.Go(func() {
		dice := rand.New(rand.NewPCG(2, 2))
		for {
			select {
			case <-done:
				return
			default:
				disturb(dice)
			}
		}
	})
	var got []byte
	buf := make([]byte, 5000)
	dice := rand.New(rand.NewPCG(3, 3))
	for {
		k, err := r.Read(buf[:1+dice.IntN(len(buf))])
		got = append(got, buf[:k]...)
		if err == io.EOF {
			break
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			r.SetReadDeadline(time.Time{}) // Trying again at once would keep virtual time from passing.
		} else if err != nil {
			t.Errorf("Read: %v", err)
			break
		}
	}
	close(done)
	wg.Wait()
	if !bytes.Equal(got, data) {
		t.Errorf("%d bytes arrived of %d, or others", len(got), len(data))
	}
}

func TestNothingIsLostWhileVerbsRun(t *testing.T) {
	test := func(t *testing.T, n *Network, pause func()) {
		a, b := pair(t, n)
		n.SetDelay("a", "b", HeavyTail(time.Microsecond, time.Millisecond))
		pump(t, a, b, func(dice *rand.Rand) {
			switch dice.IntN(6) {
			case 0:
				n.Cut("a", "b")
			case 1:
				n.Stall("a", "b")
			case 2:
				n.Partition([]string{"a"})
			case 3:
				b.SetReadDeadline(time.Now().Add(time.Duration(dice.IntN(1000)) * time.Microsecond))
			case 4:
				n.SetFilter("a", "b", func([]byte) Verdict { return Pass })
			case 5:
				n.SetFilter("a", "b", nil)
			}
			pause()
			n.Heal()
			n.Unstall("a", "b")
			pause()
		})
	}
	t.Run("bubble", func(t *testing.T) {
		bubble(t, func(t *testing.T, n *Network) {
			test(t, n, func() { time.Sleep(10 * time.Microsecond) }) // virtual
		})
	})
	t.Run("outside", func(t *testing.T) {
		withNetwork(t, func(t *testing.T, n *Network) {
			test(t, n, func() {
				// Long enough for a write's least delay, so that something
				// arrives between two cuts.
				tick := time.NewTimer(10 * time.Microsecond)
				<-tick.C
			})
		})
	})
}

// Every method at once, from many goroutines, ended by Close or Break: no
// race, no deadlock, and every blocked call returns.
func TestConcurrentMethods(t *testing.T) {
	for _, end := range []string{"close", "break", "network"} {
		both(t, func(t *testing.T, n *Network) {
			n.SetWriteCap(1 << 16)
			n.SetDelay("b", "a", HeavyTail(time.Microsecond, time.Millisecond))
			a, b := pair(t, n)
			var wg sync.WaitGroup
			loop := func(f func() error) {
				wg.Go(func() {
					for range 1000 {
						if err := f(); errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
							return
						}
					}
				})
			}
			var blocked sync.WaitGroup
			for _, c := range []*conn{a, b} {
				for range 2 {
					blocked.Go(func() {
						for buf := make([]byte, 100); ; {
							_, err := c.Read(buf)
							if errors.Is(err, os.ErrDeadlineExceeded) {
								c.SetReadDeadline(time.Time{})
							} else if err != nil {
								return
							}
						}
					})
					loop(func() error { _, err := c.Write(make([]byte, 50)); return err })
				}
				loop(func() error { return c.SetDeadline(time.Now().Add(time.Millisecond)) })
				loop(func() error { return c.SetReadDeadline(time.Time{}) })
				loop(func() error { return c.SetWriteDeadline(time.Time{}) })
				loop(func() error { c.LocalAddr(); c.RemoteAddr(); return nil })
			}
			loop(func() error { n.CutOneWay("a", "b"); n.Open(); n.Join("a", "b"); return nil })
			loop(func() error {
				c, err := n.Dialer("a")(t.Context(), "tcp", "b:1")
				if err == nil {
					c.Close()
				}
				return err
			})
			wg.Wait()
			a.SetDeadline(time.Time{})
			b.SetDeadline(time.Time{})
			switch end {
			case "close":
				a.Close()
				b.Close()
			case "break":
				n.Break("a", "b")
			case "network":
				n.Close()
			}
			blocked.Wait()
		})
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	n := New(1)
	defer n.Close()
	l, _ := n.Listen("b:1")
	c, err := n.Dialer("a")(b.Context(), "tcp", "b:1")
	if err != nil {
		b.Fatal(err)
	}
	d, _ := l.Accept()
	go io.Copy(d, d)
	buf := make([]byte, 128)
	b.ReportAllocs()
	for b.Loop() {
		c.Write(buf)
		if _, err := io.ReadFull(c, buf); err != nil {
			b.Fatal(err)
		}
	}
}
